const DRAWN = 2000; // paths that a browser redraws without delay

// ---- Graph: nodes in the order they run: input 0, heads and MLP of each layer, logits.
function prepare(model) {
  const { layers, heads, kv_heads: groups } = model.graph;
  const sources = model.graph.sources;
  const id = (name) => {
    const [, kind, layer, , index, read] = /^([a-z]+)(\d+)?(?:\.(h|kv)(\d+))?(?:<(.)>)?$/.exec(name);
    if (kind === "input") return { nodes: [0] };
    if (kind === "logits") return { nodes: [sources] };
    const first = 1 + layer * (heads + 1);
    if (kind === "m") return { nodes: [first + heads] };
    const shared = name.includes(".kv") ? heads / groups : 1; // heads that read this input
    return { nodes: Array.from({ length: shared }, (_, i) => first + index * shared + i), read };
  };
  const all = new Map();
  const edge = ({ name, score }) => {
    if (!all.has(name)) {
      const [from, to] = name.split("->").map(id);
      const sign = model.ranking === "exact nodes" || score === null ? "unsigned" : score > 0 ? "hurts" : "helps";
      all.set(name, { name, score, sign, from: from.nodes[0], to: to.nodes, read: to.read });
    }
    return all.get(name);
  };
  const ranked = model.top_edges.map(edge);
  const chosen = model.edges.map(edge);
  ranked.forEach((e, rank) => (e.rank = rank));
  const points = model.curves.find((c) => c.ranking === model.ranking).points.filter((p) => p.faithfulness !== null);
  const head = (l) => Array.from({ length: heads }, (_, h) => `a${l}.h${h}`);
  const names = ["input", ...Array.from({ length: layers }, (_, l) => [...head(l), `m${l}`]).flat(), "logits"];
  const largest = [...all.values()].reduce((most, e) => Math.max(most, Math.abs(e.score)), 1e-30);
  const m = { ...model, names, ranked, chosen, points, largest, logits: sources };
  m.sorted = [...ranked].sort((a, b) => a.from - b.from);
  // Slider stops: about 200 sizes, evenly spaced on a log scale, and every size that was measured.
  const ks = new Set([ranked.length]);
  for (let x = 0; x <= 200; x++) ks.add(Math.round(Math.max(ranked.length, 1) ** (x / 200)));
  for (const size of [...points.map((p) => p.edges), model.ranked.edges]) ks.add(smallestK(m, size));
  m.stops = [...ks].filter((k) => k >= 1 && k <= ranked.length).sort((a, b) => a - b);
  m.home = smallestK(m, model.ranked.edges);
  return m;
}

// The same as Graph.prune: edges on a path from the input to the logits. A writer comes before all of its readers.
function prune(model, sorted) {
  const reached = new Uint8Array(model.logits + 1), useful = new Uint8Array(model.logits + 1);
  reached[0] = useful[model.logits] = 1;
  for (const e of sorted) if (reached[e.from]) for (const node of e.to) reached[node] = 1;
  const kept = [];
  for (let i = sorted.length - 1; i >= 0; i--) {
    const e = sorted[i];
    if (reached[e.from] && e.to.some((node) => useful[node])) {
      useful[e.from] = 1;
      kept.push(e);
    }
  }
  return kept;
}
const best = (model, k) => model.sorted.filter((e) => e.rank < k);

// Fewest ranked edges of which `size` remain after pruning; NaN if that is not among the stored ones.
function smallestK(model, size) {
  let low = 1, high = model.ranked.length + 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (prune(model, best(model, middle)).length >= size) high = middle; else low = middle + 1;
  }
  return low <= model.ranked.length ? low : NaN;
}

// ---- Layout: one column per layer, heads above their MLP.
const WIDTH = 780, HEIGHT = 560;
function layout(model) {
  const { layers, heads } = model.graph;
  const left = 72, right = 46, top = 22;
  const column = (WIDTH - left - right) / layers, row = (HEIGHT - top) / (heads + 1.7);
  const place = [[50, top + (heads * row) / 2]];
  for (let l = 0; l < layers; l++) {
    const x = left + column * (l + 0.3);
    for (let h = 0; h < heads; h++) place.push([x, top + (h + 0.5) * row]);
    place.push([x + column * 0.45, top + (heads + 1.1) * row]);
  }
  place.push([WIDTH - 16, top + (heads * row) / 2]);
  return { place, column, row, radius: clamp(Math.min(row, column) * 0.28, 1.5, 8) };
}

function curveOf(e, { place, column, row, radius }) {
  const [x1, y1] = place[e.from], read = { q: -0.45, k: 0, v: 0.45 }[e.read] ?? 0;
  const y2 = e.to.reduce((sum, node) => sum + place[node][1], 0) / e.to.length + read * radius;
  const x2 = place[e.to[0]][0] - radius - (e.to.length > 1 ? radius * 0.8 : 0);
  const bend = (x2 - x1) * 0.5, bow = Math.abs(y2 - y1) < row / 2 && x2 - x1 > column ? row * 0.6 : 0;
  return `M${x1} ${y1}C${x1 + bend} ${y1 - bow} ${x2 - bend} ${y2 - bow} ${x2} ${y2}`;
}

