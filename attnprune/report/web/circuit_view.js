function drawNodes(model) {
  const box = byId("graph"), { layers, heads, kv_heads: groups } = model.graph;
  const { place, radius, row, column } = (model.lay = layout(model));
  box.replaceChildren();
  const svg = make(box, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": "true" });
  const skip = (step) => Math.max(1, Math.ceil(18 / step));
  for (let l = 0; l < layers; l += skip(column))
    make(svg, "text", { x: place[1 + l * (heads + 1)][0], y: 13, "text-anchor": "middle" }, l);
  for (let h = 0; h < heads; h += skip(row))
    make(svg, "text", { x: 30, y: place[1 + h][1] + 4, "text-anchor": "end" }, `h${h}`);
  make(svg, "text", { x: 30, y: place[heads + 1][1] + 4, "text-anchor": "end" }, "MLP");
  make(svg, "text", { x: 30, y: 13, "text-anchor": "end" }, "layer");
  model.edgeLayer = make(svg, "g");
  if (groups < heads)
    for (let first = 1; first < model.logits; first += heads + 1)
      for (let h = 0; h < heads; h += heads / groups) {
        const [x, y1] = place[first + h], [, y2] = place[first + h + heads / groups - 1];
        make(svg, "line", { class: "group", x1: x - radius * 1.8, x2: x - radius * 1.8, y1, y2 });
      }
  model.nodes = place.map(([x, y], node) => {
    if (node === 0 || node === model.logits) {
      const element = make(svg, "rect", { x: x - 7, y: y - 34, width: 14, height: 68, rx: 4, class: "node" });
      make(svg, "text", { class: "end", x, y: y + 50, "text-anchor": "middle" }, model.names[node]);
      return element;
    }
    const square = { x: x - radius, y: y - radius, width: 2 * radius, height: 2 * radius };
    if (model.names[node][0] === "m") return make(svg, "rect", { ...square, class: "node" });
    return make(svg, "circle", { cx: x, cy: y, r: radius, class: "node" });
  });
  model.nodes.forEach((element, node) => nodeOf.set(element, node));
}

function pathOf(model, e) {
  if (!e.path) {
    const share = clamp(1 + Math.log10(Math.abs(e.score) / model.largest) / 3, 0, 1); // three decades
    e.path = make(model.edgeLayer, "path", {
      class: `edge ${e.sign}`, d: curveOf(e, model.lay),
      "stroke-width": (0.6 + 3.4 * share ** 2).toFixed(2), "stroke-opacity": (0.1 + 0.8 * share ** 2.2).toFixed(2),
    });
    edgeOf.set(e.path, e);
  }
  return e.path;
}

// ---- State and drawing
const edgeOf = new WeakMap(), nodeOf = new WeakMap();
const models = data.models.map(prepare);
const state = { model: models[0], k: null, focus: null }; // k null: the chosen circuit
let shown = [];

function show() {
  const { model, k } = state, top = k === null ? null : best(model, k);
  const pruned = top ? prune(model, top) : model.chosen;
  const visible = top && byId("dangling").checked ? top : pruned;
  shown = [...visible].sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
  const drawn = shown.slice(0, DRAWN);
  model.edgeLayer.replaceChildren(...drawn.map((e) => pathOf(model, e)).reverse());
  byId("drawn").textContent = drawn.length < shown.length ? `strongest ${DRAWN.toLocaleString()} drawn` : "";
  const on = new Set(shown.map((e) => e.from)).add(model.logits);
  model.nodes.forEach((element, node) => element.classList.toggle("on", on.has(node)));
  byId("k").max = Math.max(model.stops.length - 1, 0);
  byId("k").value = model.stops.findIndex((stop) => stop >= (k ?? model.home));
  if (k === null && !(model.home >= 1)) byId("k").value = byId("k").max;
  byId("k-text").textContent = k === null ? "chosen" : `${k.toLocaleString()} ${k === 1 ? "edge" : "edges"}`;
  byId("k").setAttribute("aria-valuetext", byId("k-text").textContent);
  byId("chosen-mark").hidden = !(model.home >= 1);
  const share = model.stops.indexOf(model.home) / Math.max(model.stops.length - 1, 1);
  byId("chosen-mark").style.left = `calc(8px + ${share} * (100% - 16px))`; // 16px: the slider's thumb
  document.querySelector(`[name=view][value=${k === null ? "chosen" : "top"}]`).checked = true;
  byId("dangling").disabled = k === null;
  counts(pruned);
  chart(pruned.length);
  focus(null);
}

function faithfulness({ points }, size) {
  const after = points.findIndex((p) => p.edges >= size);
  if (after < 0 || (after === 0 && points[0].edges > size)) return { text: "-", note: "not measured at this size" };
  const high = points[after], low = points[after - 1];
  if (high.edges === size) return { text: high.faithfulness.toFixed(2), note: "measured, validation prompts" };
  const t = Math.log(size / Math.max(low.edges, 1)) / Math.log(high.edges / Math.max(low.edges, 1));
  const value = low.faithfulness + t * (high.faithfulness - low.faithfulness);
  return { text: `≈ ${value.toFixed(2)}`, note: `not measured; between ${low.edges} and ${high.edges} edges` };
}

function counts(pruned) {
  const { model, k } = state, { graph, test } = model, box = byId("counts");
  const tile = (name, value, note) => {
    const div = make(box, "div");
    make(div, "dt", {}, name);
    make(make(div, "dd", {}, value), "small", {}, note);
  };
  const writers = [...new Set(pruned.map((e) => e.from))].map((node) => model.names[node][0]);
  const mlps = writers.filter((kind) => kind === "m").length, heads = writers.filter((kind) => kind === "a").length;
  const f = test.faithfulness, messages = k === null ? model.counts.messages : null;
  box.replaceChildren();
  const at = k === null
    ? { text: `${f.value.toFixed(2)} [${f.low.toFixed(2)}, ${f.high.toFixed(2)}]`, note: "measured, test prompts" }
    : faithfulness(model, pruned.length);
  tile("faithfulness", at.text, at.note);
  tile("heads", heads, `of ${(graph.layers * graph.heads).toLocaleString()}`);
  tile("MLPs", mlps, `of ${graph.layers}`);
  tile("edges", pruned.length.toLocaleString(),
    `${((100 * pruned.length) / graph.edges).toPrecision(3)} % of ${graph.edges.toLocaleString()}`);
  if (messages === null) tile("messages", "-", "not measured");
  else tile("messages", messages.toLocaleString(), "per prompt");
}

function chart(size) {
  const box = byId("chart"), width = 300, height = 168, left = 30, bottom = 146, top = 8;
  const points = models.flatMap((m) => m.points), [low, high] = data.method.band;
  const measured = points.map((p) => p.faithfulness); // far outside of 0 to 1: drawn at the border
  const floor = clamp(Math.min(...measured), -0.5, 0), ceil = clamp(Math.max(...measured), high, high + 0.5);
  const most = Math.max(2, size, ...points.map((p) => p.edges), ...models.map((m) => m.counts.edges));
  const least = Math.max(1, Math.min(size || 1, ...points.map((p) => p.edges), ...models.map((m) => m.counts.edges)));
  const px = (edges) =>
    left + ((width - left - 8) * Math.log(Math.max(edges, least) / least)) / Math.max(Math.log(most / least), 1e-9);
  const py = (f) => bottom - ((bottom - top) * (clamp(f, floor, ceil) - floor)) / (ceil - floor);
  box.replaceChildren();
  const svg = make(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  make(svg, "title", {}, "Faithfulness of the best k edges after pruning, by number of edges; shaded: inside the band");
  make(svg, "rect", { class: "band", x: left, width: width - left - 8, y: py(high), height: py(low) - py(high) });
  for (const f of [0, 0.5, 1]) {
    make(svg, "line", { class: "axis", x1: left, x2: width - 8, y1: py(f), y2: py(f) });
    make(svg, "text", { x: left - 5, y: py(f) + 4, "text-anchor": "end" }, f);
  }
  ticks(svg, least, most, px, bottom, width);
  for (const m of [...models].sort((a) => (a === state.model ? 1 : -1))) {
    const g = make(svg, "g", { class: m === state.model ? "now" : "" });
    make(g, "polyline", { points: m.points.map((p) => `${px(p.edges)},${py(p.faithfulness)}`).join(" ") });
    for (const p of m.points) make(g, "circle", { cx: px(p.edges), cy: py(p.faithfulness), r: 2 });
  }
  if (models.length > 1)
    make(svg, "text", { x: width - 10, y: bottom - 6, "text-anchor": "end" }, "dotted: the other model");
  const { counts: { edges }, validation_faithfulness: f } = state.model;
  if (f !== null) make(svg, "path", { class: "pick", d: `M${px(edges)} ${py(f) - 6}l6 6-6 6-6-6z` });
  make(svg, "line", { class: "here", x1: px(size), x2: px(size), y1: top, y2: bottom });
}

