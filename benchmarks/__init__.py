"""One script per claim about speed: it times both sides alternately and prints their ratio."""
