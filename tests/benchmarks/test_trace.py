import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from benchmarks import trace


def test_own_times_are_worked_by_hand():
    # "outer" contains "first" and "second", "second" contains "inner"; "after" begins when "outer"
    # ends and overlaps "late".
    events = [
        (0, 100, "outer"),
        (10, 20, "first"),
        (40, 50, "second"),
        (45, 5, "inner"),
        (100, 7, "after"),
        (105, 10, "late"),
    ]
    own = {"outer": 30, "first": 20, "second": 45, "inner": 5, "after": 5, "late": 10}
    assert dict(trace.own_times(events)) == own and sum(own.values()) == 115


@pytest.mark.parametrize(
    ("name", "layer", "primitive"),
    [
        (
            "jit(train_step)/jvp(Conv1D)/conv1/conv_general_dilated",
            "forward conv1",
            "conv_general_dilated",
        ),
        (
            "jit(train_step)/transpose(jvp(Net))/block/dense1/dot_general",
            "backward block/dense1",
            "dot_general",
        ),
        (
            "jit(many)/while/body/jvp(Net)/max_pool/jit(_where)/select_n",
            "forward max_pool",
            "select_n",
        ),
        ("jit(train_step)/integer_pow", "the rest of the step", "integer_pow"),
    ],
)
def test_a_name_gives_layer_and_primitive(name, layer, primitive):
    assert trace.layer_of(name) == (layer, primitive)


def test_a_real_trace_names_its_layers(tmp_path, capsys):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="small")(nn.relu(nn.Dense(512, name="large")(x)))

    x = jnp.ones((256, 512))
    params = Net().init(jax.random.key(0), x)
    step = jax.jit(jax.grad(lambda params: Net().apply(params, x).sum()))
    # Another program of the same name, whose instructions have some of the same names.
    other = jax.jit(lambda x: jnp.cos(jnp.sin(x) @ x.T) @ jnp.cos(x))
    jax.block_until_ready(step(params))
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            jax.block_until_ready(step(params))
        other(x[:4]).block_until_ready()
    rows = trace.operations(trace.newest(tmp_path))
    # One product forward and one backward (x needs no gradient), three times each.
    counts = {(row.layer, row.operation): row.count for row in rows}
    assert (
        counts["forward large", "dot_general"] == 3 and counts["backward large", "transpose"] == 3
    )
    assert [row.typical for row in rows] == sorted((row.typical for row in rows), reverse=True)
    assert all(row.seconds > 0 and row.typical > 0 for row in rows[:5])
    assert trace.main([str(tmp_path), "--top=1"]) == 0
    _, first, rest, total = capsys.readouterr().out.splitlines()
    assert first.startswith(f"  {rows[0].layer}: {rows[0].operation} ")
    assert first.endswith(f" {rows[0].count}") and rest.startswith(f"  {len(rows) - 1} more ")
    assert total.startswith("  total ") and total.endswith(f" {sum(row.count for row in rows)}")


def test_without_a_trace_the_message_names_the_flag(tmp_path, capsys):
    assert trace.main([str(tmp_path)]) == 2
    assert "has no *.xplane.pb. Train with --profile_steps=20,5" in capsys.readouterr().err
