// Sends files to the server one after the other and draws its results. Names and labels are always set as text.

const BARS = 10; // labels with a bar before "Show all"
const ROWS = 12; // most labels with a row over time, those with the highest peaks
const ROW_HEIGHT = 24; // CSS pixels, .names span
const ROW_GAP = 2;
// Matplotlib's magma in nine steps, for the spectrogram.
const MAGMA = ["000004", "1d1147", "51127c", "832681", "b73779", "e75263", "fc8961", "fec488", "fcfdbf"].map(rgb);

const results = document.getElementById("results");
const waiting = [];
let about = null;
let working = false;

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function rgb(hex) {
  const number = parseInt(hex.replace("#", ""), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

function clock(seconds, digits = 0) {
  const unit = 10 ** digits;
  const whole = Math.round(seconds * unit);
  const minutes = Math.floor(whole / unit / 60);
  const rest = ((whole - minutes * 60 * unit) / unit).toFixed(digits);
  return `${minutes}:${rest.padStart(digits ? 3 + digits : 2, "0")}`;
}

function duration(seconds) {
  return seconds % 60 || seconds < 120 ? `${+seconds.toFixed(1)} s` : `${seconds / 60} minutes`;
}

function shown(value) {
  return about.task === "regression" ? value.toPrecision(4) : `${(100 * value).toFixed(1)} %`;
}

/* The model */

async function loadModel() {
  const response = await fetch("api/model");
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  about = await response.json();
  const what = { single_label: "labels, one per file", multi_label: "tags", regression: "outputs" }[about.task];
  const { measure } = about;
  const value = measure && (measure.name === "accuracy" ? `${(100 * measure.value).toFixed(1)} %` : measure.value.toFixed(3));
  const measured = measure && `${measure.name.replaceAll("_", " ")} ${value} on its ${measure.split} split`;
  document.getElementById("summary").textContent =
    `Genres and tags of your music, predicted by ${about.network}, ${about.labels.length} ${what}; ` +
    `${measured || "its accuracy has not been measured"}.`;
  document.getElementById("synthetic").hidden = !about.synthetic;
  document.getElementById("limits").textContent =
    `wav, flac, mp3, ogg, opus, aiff or au; up to ${size(about.max_bytes)} and ${duration(about.max_seconds)} each.`;
  document.getElementById("version").textContent = `musicgenre ${about.version}.`;
  document.getElementById("card").replaceChildren(...markdown(about.card));
}

function size(bytes) {
  return bytes >= 1e6 ? `${+(bytes / 1e6).toFixed(1)} MB` : `${+(bytes / 1e3).toFixed(1)} kB`;
}

// The Markdown of model cards: headings, lists, paragraphs, `code`, **strong**.
function markdown(text) {
  const blocks = [];
  let list = null;
  let paragraph = [];
  const close = () => {
    if (paragraph.length) blocks.push(make("p", {}, ...inline(paragraph.join(" "))));
    paragraph = [];
    list = null;
  };
  for (const line of text.split("\n")) {
    if (/^#+ /.test(line)) {
      close();
      blocks.push(make("h3", {}, ...inline(line.replace(/^#+ /, ""))));
    } else if (line.startsWith("- ")) {
      if (!list) {
        close();
        list = make("ul");
        blocks.push(list);
      }
      list.append(make("li", {}, ...inline(line.slice(2))));
    } else if (line.trim()) {
      if (list) close();
      paragraph.push(line.trim());
    } else {
      close();
    }
  }
  close();
  return blocks;
}

function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    if (/^`[^`]+`$/.test(part)) return make("code", { textContent: part.slice(1, -1) });
    if (/^\*\*[^*]+\*\*$/.test(part)) return make("strong", { textContent: part.slice(2, -2) });
    return part;
  });
}

/* Files, one after the other */

function add(files) {
  const items = Array.from(files, card);
  results.prepend(...items.map((item) => item.element));
  waiting.push(...items);
  next();
}

async function next() {
  if (working) return;
  working = true;
  while (waiting.length) await handle(waiting.shift());
  working = false;
}

function card(file) {
  const title = make("h2", { textContent: file.name });
  const status = make("p", { className: "quiet status", textContent: "waiting …" });
  status.setAttribute("role", "status");
  const bar = make("progress", { max: 1, hidden: true });
  bar.setAttribute("aria-label", `progress of ${file.name}`);
  const stop = make("button", { type: "button", textContent: "Cancel" });
  stop.setAttribute("aria-label", `Cancel ${file.name}`);
  const body = make("div");
  const element = make(
    "article",
    { className: "result" },
    make("div", { className: "result-head" }, make("div", {}, title, status), stop),
    bar,
    body,
  );
  element.setAttribute("aria-label", file.name);
  const item = { file, element, status, bar, stop, body, removed: new AbortController() };
  stop.addEventListener("click", () => {
    item.removed.abort();
    element.remove();
  });
  return item;
}

async function handle(item) {
  if (item.removed.signal.aborted) return;
  try {
    if (!about) await loadModel();
    if (item.file.size > about.max_bytes)
      throw new Error(`${item.file.name}: larger than the ${size(about.max_bytes)} that this server accepts.`);
    let answer = await send(item);
    while (answer.status === 503 && !item.removed.signal.aborted) {
      item.status.textContent = "the server is busy; trying again soon …";
      await new Promise((resolve) => setTimeout(resolve, 1000 * (Number(answer.retry) || 5)));
      answer = await send(item);
    }
    if (answer.status !== 200) throw new Error(answer.json?.error ?? `the server failed (${answer.status}); see its terminal for the reason.`);
    item.bar.hidden = true;
    show(item, answer.json);
  } catch (error) {
    if (item.removed.signal.aborted) return;
    item.bar.hidden = true;
    item.status.textContent = "could not be used";
    const message = make("p", { className: "error", textContent: error.message });
    message.setAttribute("role", "alert");
    item.body.replaceChildren(message);
  }
  item.stop.textContent = "Remove";
  item.stop.setAttribute("aria-label", `Remove ${item.file.name}`);
}

// fetch() does not report upload progress.
function send(item) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "api/tag");
    request.setRequestHeader("X-File-Name", encodeURIComponent(item.file.name));
    request.responseType = "json";
    item.bar.hidden = false;
    item.bar.value = 0;
    item.status.textContent = "sending …";
    request.upload.addEventListener("progress", (event) => {
      item.bar.value = event.loaded / event.total;
      item.status.textContent = `sending: ${size(event.loaded)} of ${size(event.total)}`;
    });
    request.upload.addEventListener("load", () => {
      item.bar.removeAttribute("value");
      item.status.textContent = "analysing …";
    });
    request.addEventListener("load", () =>
      resolve({ status: request.status, json: request.response, retry: request.getResponseHeader("Retry-After") }),
    );
    request.addEventListener("error", () => reject(new Error("the connection was lost; is the server still running?")));
    request.addEventListener("abort", () => reject(new Error("cancelled")));
    const abort = () => request.abort();
    item.removed.signal.addEventListener("abort", abort);
    request.addEventListener("loadend", () => item.removed.signal.removeEventListener("abort", abort));
    request.send(item.file);
  });
}

/* Results */

function show(item, answer) {
  item.status.textContent = clock(answer.seconds);
  item.body.replaceChildren(
    make("div", { className: "panels" }, bars(answer.labels), ...(answer.neighbours ? [neighbours(answer.neighbours)] : [])),
    ...timeline(item, answer),
    numbers(answer),
  );
}

function bars(labels) {
  const largest = about.task === "regression" ? Math.max(...labels.map((entry) => Math.abs(entry.probability)), 1e-9) : 1;
  const list = make("ol", { className: "bars" });
  labels.forEach((entry, index) => {
    const fill = make("div", { className: "fill" });
    fill.style.width = `${(100 * Math.abs(entry.probability)) / largest}%`;
    const track = make("div", { className: "track" }, fill);
    track.setAttribute("aria-hidden", "true");
    const label = make("span", { className: "label", textContent: entry.label, title: entry.label });
    const number = make("span", { className: "number", textContent: shown(entry.probability) });
    list.append(make("li", { hidden: index >= BARS }, label, track, number));
  });
  const panel = make("section", {}, make("h3", { textContent: about.task === "multi_label" ? "Tags" : "Labels" }), list);
  if (labels.length > BARS) {
    const more = make("button", { type: "button", textContent: `Show all ${labels.length}` });
    more.addEventListener("click", () => {
      for (const row of list.children) row.hidden = false;
      more.remove();
    });
    panel.append(more);
  }
  return panel;
}

function neighbours(found) {
  const list = make("ol", { className: "neighbours" });
  for (const entry of found) {
    list.append(
      make(
        "li",
        {},
        make("span", { className: "file", textContent: entry.file }),
        make("span", { className: "number", textContent: entry.similarity.toFixed(3) }),
      ),
    );
  }
  return make("section", {}, make("h3", { textContent: "Most similar indexed files (cosine similarity)" }), list);
}

function timeline(item, answer) {
  const { taggram, spectrogram, seconds } = answer;
  const peaks = taggram.labels.map((_, index) => Math.max(...taggram.probabilities.map((row) => row[index])));
  const ranks = taggram.labels.map((label) => answer.labels.findIndex((entry) => entry.label === label));
  const rows = taggram.labels
    .map((_, index) => index)
    .sort((a, b) => peaks[b] - peaks[a])
    .slice(0, ROWS)
    .sort((a, b) => ranks[a] - ranks[b]);
  const limits = about.task === "regression" ? [Math.min(...taggram.probabilities.flat()), Math.max(...taggram.probabilities.flat())] : [0, 1];
  // Each time has the colour of the window whose middle is nearest.
  const middles = taggram.starts.map((start, index) => (start + taggram.ends[index]) / 2);
  const edges = [0, ...middles.slice(1).map((middle, index) => (middle + middles[index]) / 2), seconds];

  const levels = make("canvas", { className: "levels" });
  const cells = make("canvas", { className: "cells" });
  cells.style.height = `${ROW_HEIGHT * rows.length}px`;
  const head = make("div", { className: "head", hidden: true });
  const plots = make("div", { className: "plots" }, levels, cells, head);
  plots.setAttribute("role", "img");
  plots.setAttribute("aria-label", "Spectrogram, and the labels over time below it. The table below has the same values.");
  const hertz = make("div", { className: "hertz" });
  for (const [position, value] of spectrogram.ticks) {
    const tick = make("span", { textContent: value >= 1000 ? `${value / 1000} kHz` : `${value} Hz` });
    tick.style.bottom = `${(100 * (position + 0.5)) / spectrogram.bands}%`;
    hertz.append(tick);
  }
  const names = make("div", { className: "names" });
  for (const row of rows) names.append(make("span", { textContent: taggram.labels[row], title: taggram.labels[row] }));
  const gutter = make("div", { className: "gutter" }, hertz, names);
  gutter.setAttribute("aria-hidden", "true");
  const times = make("div", { className: "times" });
  times.setAttribute("aria-hidden", "true");
  const readout = make("div", { className: "readout" });
  const figure = make(
    "figure",
    { className: "timeline" },
    make("h3", { textContent: "Over time" }),
    make("div", { className: "row" }, gutter, plots),
    make("div", { className: "row" }, make("div"), times),
    make("div", { className: "row" }, make("div"), readout),
  );

  const image = picture(spectrogram);
  const draw = () => {
    drawLevels(levels, image, spectrogram, seconds);
    drawCells(cells, taggram.probabilities, rows, edges, seconds, limits);
    drawTimes(times, seconds);
    thin(hertz);
  };
  new ResizeObserver(draw).observe(plots);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw, { signal: item.removed.signal });

  const at = (time) => {
    let window = edges.findIndex((edge) => edge > time) - 1;
    if (window < 0) window = middles.length - 1;
    const best = rows
      .map((row) => [taggram.labels[row], taggram.probabilities[window][row]])
      .sort((a, b) => b[1] - a[1])
      .slice(0, 3);
    readout.textContent = `${clock(time, 1)}: ${best.map(([label, value]) => `${label} ${shown(value)}`).join(", ")}`;
  };
  const rest = () => {
    const span = duration(about.window_seconds);
    const one = taggram.starts.length === 1;
    readout.replaceChildren(scale(limits, one ? `the file is one window of ${span}` : `each column covers ${span}`));
  };
  const timeOf = (event) => {
    const box = plots.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * seconds;
  };
  const player = sound(item, seconds, (time) => {
    head.hidden = false;
    head.style.left = `${(100 * time) / seconds}%`;
    at(time);
  });
  plots.addEventListener("pointermove", (event) => at(timeOf(event)));
  plots.addEventListener("pointerleave", () => (player.currentTime ? at(player.currentTime) : rest()));
  plots.addEventListener("click", (event) => {
    if (!player.hidden) player.currentTime = timeOf(event);
  });
  rest();
  return [figure, player];
}

function scale(limits, text) {
  const [low, high] = about.task === "regression" ? limits.map(shown) : ["0 %", "100 %"];
  return make("div", { className: "scale quiet" }, make("span", {}, low, make("i"), high), text);
}

// Plays the chosen file from this page; the server stores no sound.
function sound(item, seconds, moved) {
  const address = URL.createObjectURL(item.file);
  const player = make("audio", { controls: true, preload: "metadata", src: address });
  player.setAttribute("aria-label", `Play ${item.file.name}`);
  item.removed.signal.addEventListener("abort", () => {
    player.removeAttribute("src");
    URL.revokeObjectURL(address);
  });
  player.addEventListener("error", () => {
    if (item.removed.signal.aborted) return;
    player.hidden = true;
    player.before(make("p", { className: "quiet", textContent: "This browser cannot play files of this type." }));
  });
  const tell = () => moved(Math.min(player.currentTime, seconds));
  const follow = () => {
    tell();
    if (!player.paused) requestAnimationFrame(follow);
  };
  player.addEventListener("play", follow);
  player.addEventListener("seeked", tell);
  return player;
}

// The spectrogram with one pixel per cell.
function picture(spectrogram) {
  const { columns, bands } = spectrogram;
  const bytes = Uint8Array.from(atob(spectrogram.levels), (letter) => letter.charCodeAt(0));
  const canvas = make("canvas", { width: columns, height: bands });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, bands);
  for (let column = 0; column < columns; column++) {
    for (let band = 0; band < bands; band++) {
      const offset = 4 * ((bands - 1 - band) * columns + column);
      const [red, green, blue] = mixed(MAGMA, bytes[column * bands + band] / 255);
      pixels.data.set([red, green, blue, 255], offset);
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function mixed(colours, fraction) {
  const position = Math.min(Math.max(fraction, 0), 1) * (colours.length - 1);
  const index = Math.min(Math.floor(position), colours.length - 2);
  return colours[index].map((value, channel) => value + (position - index) * (colours[index + 1][channel] - value));
}

function sized(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(Math.round(canvas.clientWidth * ratio), 1);
  canvas.height = Math.max(Math.round(canvas.clientHeight * ratio), 1);
  return canvas.getContext("2d");
}

function drawLevels(canvas, image, spectrogram, seconds) {
  const context = sized(canvas);
  const scale = canvas.width / seconds;
  context.fillStyle = "#000004";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, spectrogram.start * scale, 0, spectrogram.columns * spectrogram.seconds * scale, canvas.height);
}

function drawCells(canvas, probabilities, rows, edges, seconds, [low, high]) {
  const context = sized(canvas);
  const style = getComputedStyle(document.documentElement);
  const colours = ["--low", "--high"].map((name) => rgb(style.getPropertyValue(name).trim()));
  const scale = canvas.width / seconds;
  const height = canvas.height / rows.length;
  const gap = (ROW_GAP * height) / ROW_HEIGHT;
  rows.forEach((row, line) => {
    probabilities.forEach((values, index) => {
      const fraction = (values[row] - low) / (high - low || 1);
      context.fillStyle = `rgb(${mixed(colours, fraction).map(Math.round).join(" ")})`;
      const left = Math.round(edges[index] * scale);
      context.fillRect(left, line * height, Math.round(edges[index + 1] * scale) - left, height - gap);
    });
  });
}

function drawTimes(box, seconds) {
  const room = Math.max(box.clientWidth / 70, 2);
  const step = [0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600].find((value) => seconds / value <= room) ?? seconds;
  const ticks = [];
  for (let time = 0; time <= seconds; time += step) {
    const tick = make("span", { textContent: clock(time, step < 1 ? 1 : 0) });
    tick.style.left = `${(100 * time) / seconds}%`;
    if (time / seconds > 0.97) tick.className = "last";
    ticks.push(tick);
  }
  box.replaceChildren(...ticks);
}

// If ticks would touch, the upper one stays.
function thin(box) {
  let above = -Infinity;
  for (const tick of box.children) {
    const top = tick.offsetTop;
    tick.style.visibility = top - above < 13 ? "hidden" : "";
    if (!tick.style.visibility) above = top;
  }
}

// The values of the pictures as a table, for screen readers.
function numbers(answer) {
  const { taggram } = answer;
  const box = make("details", {}, make("summary", { textContent: "As numbers" }));
  box.addEventListener(
    "toggle",
    () => {
      const labels = answer.labels.map((entry) => entry.label);
      const order = labels.map((label) => taggram.labels.indexOf(label));
      const head = make("tr", {}, ...["from", "to", ...labels].map((text) => make("th", { scope: "col", textContent: text })));
      const rows = taggram.starts.map((start, index) =>
        make(
          "tr",
          {},
          make("td", { textContent: clock(start, 1) }),
          make("td", { textContent: clock(taggram.ends[index], 1) }),
          ...order.map((column) => make("td", { textContent: shown(taggram.probabilities[index][column]) })),
        ),
      );
      const table = make("table", {}, make("caption", { className: "quiet", textContent: `Labels over time of ${answer.file}` }));
      table.append(make("thead", {}, head), make("tbody", {}, ...rows));
      const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
      scroll.setAttribute("role", "region");
      scroll.setAttribute("aria-label", "Labels over time as numbers");
      box.append(scroll);
    },
    { once: true },
  );
  return box;
}

/* Dropping and choosing */

const input = document.getElementById("files");
input.addEventListener("change", () => {
  add(input.files);
  input.value = "";
});
for (const type of ["dragenter", "dragover"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
for (const type of ["dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    if (type === "drop" || !event.relatedTarget) document.body.classList.remove("dragging");
    if (type === "drop") add(event.dataTransfer.files);
  });
}

loadModel().catch((error) => {
  document.getElementById("summary").textContent = `The model cannot be reached: ${error.message}.`;
});
