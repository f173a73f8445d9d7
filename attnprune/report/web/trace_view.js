// ---- Layout: a column per token, a row per layer; a message of layer l goes from the stream below it to the one above.
const LEFT = 46, TOP = 34, BOTTOM = 86;
const ROWS = 300; // of the list
const models = data.models;
const state = { model: null, k: 0, chosen: null };
const messageOf = new WeakMap();
const tokens = data.tokens;
const named = (position) => `${tokens[position]}(${position})`;
const short = (x) => Math.abs(x) >= 0.001 || x === 0 ? x.toFixed(3) : x.toExponential(1);

function layout(model) {
  const room = byId("scroll").clientWidth - LEFT - 34;
  const column = clamp(room / tokens.length, 17, 96), row = clamp(600 / model.layers, 15, 130);
  const slanted = column < 8 * Math.max(...tokens.map((t) => t.length)) + 4;
  const width = LEFT + column * tokens.length + 34, height = TOP + row * model.layers + (slanted ? BOTTOM : 26);
  return { column, row, slanted, width, height, x: (i) => LEFT + column * (i + 0.5), y: (l) => TOP + row * (model.layers - l) };
}

// Messages with the same ends lie beside each other; one from a token to itself swings out, off the token's own line.
function place(model) {
  const { column, row, x, y } = model.lay, groups = new Map();
  for (const m of model.messages) {
    const ends = `${m.layer} ${m.key} ${m.query}`;
    groups.set(ends, [...(groups.get(ends) ?? []), m]);
  }
  for (const group of groups.values())
    group.forEach((m, i) => {
      const isSelf = m.key === m.query;
      const swing = isSelf ? (Math.min(column * 0.8, 24) * (i + 2)) / (group.length + 1) : 0;
      const step = isSelf ? 0 : Math.min(5, (column * 0.7) / group.length), off = (i - (group.length - 1) / 2) * step;
      const [x1, y1, x2, y2] = [x(m.key) + off, y(m.layer), x(m.query) + off, y(m.layer + 1)];
      const [c1, c2] = [(x1 - swing).toFixed(1), (x2 - swing).toFixed(1)], lift = row * (isSelf ? 0.2 : 0.75);
      m.path = `M${x1.toFixed(1)} ${y1}C${c1} ${y1 - lift} ${c2} ${y2 + lift} ${x2.toFixed(1)} ${y2}`;
    });
}

function draw(model) {
  const lay = (model.lay = layout(model)), { x, y, row } = lay, box = byId("graph");
  box.replaceChildren();
  const svg = make(box, "svg", { viewBox: `0 0 ${lay.width} ${lay.height}`, width: lay.width, height: lay.height, "aria-hidden": "true" });
  const skip = Math.max(1, Math.ceil(15 / row));
  for (let l = 0; l < model.layers; l++) {
    make(svg, "line", { class: "row", x1: LEFT, x2: lay.width - 20, y1: y(l), y2: y(l) });
    if (l % skip === 0) make(svg, "text", { x: LEFT - 8, y: y(l + 0.5) + 4, "text-anchor": "end" }, l);
  }
  make(svg, "text", { x: 2, y: TOP - 8 }, "layer");
  tokens.forEach((token, i) => {
    const last = i === tokens.length - 1;
    make(svg, "line", { class: last ? "column traced" : "column", x1: x(i), x2: x(i), y1: y(0), y2: y(model.layers) });
    const at = lay.slanted
      ? { transform: `translate(${x(i) + 4} ${y(0) + 10}) rotate(-58)`, "text-anchor": "end" }
      : { x: x(i), y: y(0) + 17, "text-anchor": "middle" };
    const label = token.length > 14 ? `${token.slice(0, 13)}…` : token;
    make(make(svg, "text", { class: "token", ...at }, label), "title", {}, named(i));
  });
  make(svg, "text", { class: "answer", x: lay.width - 6, y: TOP - 10, "text-anchor": "end" }, `→ ${model.answer}`);
  place(model);
  const layer = make(svg, "g"), most = Math.max(...model.messages.map((m) => Math.abs(m.effect)), 1e-30);
  for (const m of [...model.messages].reverse()) {
    const share = clamp(1 + Math.log10(Math.max(Math.abs(m.effect), 1e-30) / most) / 3, 0, 1); // three decades
    m.element = make(layer, "path", {
      class: "message", d: m.path, style: `--hue: ${hue(model, m.head)}`, "stroke-width": (0.8 + 3.2 * share ** 2).toFixed(2),
      "stroke-opacity": (0.35 + 0.6 * share).toFixed(2),
    });
    messageOf.set(m.element, m);
  }
  const heads = [...new Set(model.messages.map((m) => m.head))].sort((a, b) => a - b), key = byId("heads");
  key.replaceChildren();
  for (const head of heads) {
    const entry = make(key, "span");
    make(entry, "i", { style: `--hue: ${hue(model, head)}` });
    entry.append(`head ${head}`);
  }
}
const hue = (model, head) => Math.round((360 * head) / model.heads);

// ---- Following: what wrote where a message reads, in earlier layers; what reads where it writes, in later ones.
function reach(start, shown, isNext) {
  const all = new Set([start]);
  for (let edge = [start]; edge.length; ) {
    edge = shown.filter((m) => !all.has(m) && edge.some((e) => isNext(m, e)));
    edge.forEach((m) => all.add(m));
  }
  return all;
}

function follow(start, shown) {
  const up = reach(start, shown, (m, e) => m.layer < e.layer && m.query === e.key);
  const down = reach(start, shown, (m, e) => m.layer > e.layer && m.key === e.query);
  return { all: new Set([...up, ...down]), up: up.size - 1, down: down.size - 1 };
}

function choose(message) {
  const { model, k } = state, shown = model.messages.slice(0, k);
  state.chosen = message && shown.includes(message) ? message : null;
  byId("graph").classList.toggle("focused", state.chosen !== null);
  const path = state.chosen && follow(state.chosen, shown);
  for (const m of model.messages) {
    m.element.classList.toggle("hot", path !== null && path.all.has(m));
    m.element.classList.toggle("chosen", m === state.chosen);
    m.line?.classList.toggle("chosen", m === state.chosen);
  }
  describe(state.chosen, path);
}

function describe(m, path) {
  const box = byId("detail");
  box.replaceChildren();
  make(box, "h2", {}, m ? `Message ${m.rank + 1}: layer ${m.layer}, head ${m.head}` : "Message");
  if (!m) return make(box, "p", { class: "dim" }, "Point at an arc, or click one to follow it up- and downstream.");
  const list = make(box, "dl");
  const row = (name, value) => { make(list, "dt", {}, name); make(list, "dd", {}, value); };
  const moved = (shifts) => shifts.map((s) => `${s.text} ${s.logit > 0 ? "+" : ""}${s.logit.toFixed(2)}`).join("  ");
  row("from", named(m.key));
  row("to", named(m.query));
  row("weight", m.weight.toFixed(3));
  row(m.exact ? "effect" : "effect, estimated", `${short(m.effect)} nats`);
  row("raises", moved(m.raises));
  row("lowers", moved(m.lowers));
  if (m.opened) opening(m.opened, row);
  if (path) row("follows", `${path.up} upstream, ${path.down} downstream`);
}

// Why the edge is open: the largest writers of either side; in brackets the score without each.
function opening(o, row) {
  const signed = (x) => `${x < 0 ? "" : "+"}${x.toFixed(2)}`;
  const term = (w) => {
    const then = w.open_without === false ? ", closed" : "";
    return `${w.source} ${signed(w.value)}${w.without === null ? "" : ` (${w.without.toFixed(2)}${then})`}`;
  };
  row("score", o.bias === null ? o.score.toFixed(2) : `${o.score.toFixed(2)}, bias ${signed(o.bias)}`);
  row("into the query", [...o.by_query.map(term), `others ${signed(o.query_remainder)}`].join("  "));
  row("into the key", [...o.by_key.map(term), `others ${signed(o.key_remainder)}`].join("  "));
}

// ---- Size
function show() {
  const { model, k } = state, most = model.messages.length;
  model.messages.forEach((m, i) => {
    m.element.style.display = i < k ? "" : "none";
    m.line?.classList.toggle("out", i >= k);
  });
  byId("k").max = most;
  byId("k").min = Math.min(1, most);
  byId("k").value = k;
  byId("k-text").textContent = `${k.toLocaleString()} of ${most.toLocaleString()}`;
  counts();
  chart();
  choose(state.chosen);
}

function measuredAt({ curve }, size) {
  const after = curve.findIndex((p) => p.size >= size);
  const high = curve[after], low = curve[after - 1];
  if (!high) return null;
  if (high.size === size || !low) return high;
  const t = Math.log(size / low.size) / Math.log(high.size / low.size);
  const mix = (name) => low[name] + t * (high[name] - low[name]);
  return { between: [low.size, high.size], share: mix("share"), kl: mix("kl"), difference: mix("difference") };
}

function counts() {
  const { model, k } = state, box = byId("counts"), at = measuredAt(model, k) ?? model.closed;
  const tile = (name, value, note) => {
    const div = make(box, "div");
    make(div, "dt", {}, name);
    make(make(div, "dd", {}, value), "small", {}, note);
  };
  const about = at.between ? "≈ " : "";
  box.replaceChildren();
  tile("share of the prediction kept", about + at.share.toFixed(3),
    at.between ? `not measured; between ${at.between[0]} and ${at.between[1]} messages` : "measured, all others closed");
  tile("messages", k.toLocaleString(), `of ${model.open.toLocaleString()} sent`);
  tile("KL to the full run", about + short(at.kl), "nats");
  tile("logit difference", about + at.difference.toFixed(2), `full ${model.full.difference.toFixed(2)}`);
  tile("heads", new Set(model.messages.slice(0, k).map((m) => m.layer * model.heads + m.head)).size,
    `of ${(model.layers * model.heads).toLocaleString()}`);
}

// A set can be worse than none: the axis reaches down to the lowest share of either model, to -1 at most.
function chart() {
  const box = byId("chart"), width = 300, height = 150, left = 34, bottom = 128, top = 8;
  const most = Math.max(2, ...models.map((m) => m.messages.length));
  const lowest = Math.min(0, ...models.flatMap((m) => m.curve.map((p) => p.share))), floor = Math.max(lowest, -1);
  const px = (size) => left + ((width - left - 8) * Math.log(Math.max(size, 1))) / Math.log(most);
  const py = (share) => bottom - ((bottom - top) * (clamp(share, floor, 1) - floor)) / (1 - floor);
  box.replaceChildren();
  const svg = make(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  make(svg, "title", {}, "Share of the prediction kept by the first messages of the list alone");
  for (const share of floor < 0 ? [1, 0.5, 0, floor] : [0, 0.5, 1]) {
    const label = lowest < -1 && share === floor ? "≤ -1" : +share.toFixed(2);
    make(svg, "line", { class: "axis", x1: left, x2: width - 8, y1: py(share), y2: py(share) });
    if (share < 0 && py(share) - py(0) < 11) continue; // no room for its text
    make(svg, "text", { x: left - 5, y: py(share) + 4, "text-anchor": "end" }, label);
  }
  ticks(svg, 1, most, px, bottom, width);
  for (const m of [...models].sort((a) => (a === state.model ? 1 : -1))) {
    const g = make(svg, "g", { class: m === state.model ? "now" : "" });
    make(g, "polyline", { points: m.curve.map((p) => `${px(p.size)},${py(p.share)}`).join(" ") });
    for (const p of m.curve) {
      const [x, y] = [px(p.size), py(p.share)];
      if (p.share >= -1) make(g, "circle", { cx: x, cy: y, r: 2 });
      else make(make(g, "path", { class: "beyond", d: `M${x - 4} ${y - 5}h8l-4 7z` }), "title", {}, p.share.toFixed(3));
    }
  }
  if (models.length > 1)
    make(svg, "text", { x: left + 6, y: top + 14 }, "dotted: the other model");
  make(svg, "line", { class: "here", x1: px(state.k), x2: px(state.k), y1: top, y2: bottom });
}

// ---- List
function fill(model) {
  const box = byId("list");
  box.replaceChildren();
  const table = make(box, "table"), head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  for (const name of ["", "head", "from", "to", "weight", "effect", "its value raises"])
    make(head, "th", ["", "weight", "effect"].includes(name) ? { class: "num" } : {}, name);
  for (const m of model.messages.slice(0, ROWS)) {
    m.line = make(body, "tr");
    make(m.line, "td", { class: "num" }, m.rank + 1);
    const cell = make(m.line, "td");
    make(cell, "i", { style: `--hue: ${hue(model, m.head)}` });
    cell.append(`${m.layer}.${m.head}`);
    make(m.line, "td", {}, named(m.key));
    make(m.line, "td", {}, named(m.query));
    make(m.line, "td", { class: "num" }, m.weight.toFixed(3));
    make(m.line, "td", { class: "num" }, (m.exact ? "" : "≈ ") + short(m.effect));
    make(m.line, "td", {}, m.raises.map((s) => s.text).join("  "));
    m.line.addEventListener("click", () => { reveal(m); choose(m); });
  }
  if (model.messages.length > ROWS) make(box, "p", { class: "dim" }, `and ${model.messages.length - ROWS} more, in trace.json`);
}

function reveal(m) {
  if (m.rank < state.k) return;
  state.k = m.rank + 1;
  show();
}

function turnTo(model) {
  Object.assign(state, { model, k: model.messages.length, chosen: null });
  fill(model);
  draw(model);
  show();
}

const found = (element) => messageOf.get(element);
const tipOf = (m) => `${m.layer}.${m.head}  ${named(m.key)} → ${named(m.query)}  weight ${m.weight.toFixed(3)}  effect ${short(m.effect)}`;

function point(event) {
  const m = under(event.clientX, event.clientY, found);
  showTip(event, m === null ? null : tipOf(m));
  if (state.chosen === null) describe(m, null);
}

function walk(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") choose(null);
  if (!step || !state.k) return;
  event.preventDefault();
  const rank = state.chosen ? state.chosen.rank + step : step > 0 ? 0 : state.k - 1;
  choose(state.model.messages[clamp(rank, 0, state.k - 1)]);
}

for (const model of models) model.messages.forEach((m, rank) => (m.rank = rank));
byId("k").addEventListener("input", () => { state.k = +byId("k").value; show(); });
for (const radio of document.querySelectorAll("[name=model]"))
  radio.addEventListener("change", () => turnTo(models[radio.value]));
byId("graph").addEventListener("pointermove", point);
byId("graph").addEventListener("pointerleave", (event) => showTip(event, null));
byId("graph").addEventListener("click", (event) => choose(under(event.clientX, event.clientY, found)));
byId("graph").addEventListener("keydown", walk);
addEventListener("resize", () => { draw(state.model); show(); });
turnTo(models[0]);
