// ---- Focus: a node or an edge, by pointer or keyboard
function focus(what) {
  const { model } = state, edges = what === null ? [] : what.name ? [what] : around(what);
  state.focus = what;
  byId("graph").classList.toggle("focused", what !== null);
  for (const element of document.querySelectorAll("#graph .hot")) element.classList.remove("hot");
  for (const e of edges) if (e.path) e.path.classList.add("hot");
  const nodes = what === null ? [] : what.name ? [what.from, ...what.to] : [what];
  for (const node of nodes) model.nodes[node].classList.add("hot");
  const box = byId("detail");
  box.replaceChildren();
  const all = what === null ? shown : edges;
  const title = what === null ? "Strongest edges" : what.name ? "Edge" : `${model.names[what]}: ${all.length} edges`;
  make(box, "h2", {}, title);
  const table = make(make(box, "table"), "tbody");
  for (const e of all.slice(0, 7)) {
    const row = make(table, "tr");
    make(row, "td", {}, e.name);
    make(row, "td", { class: `num ${e.sign}` }, scoreOf(e));
  }
}
const around = (node) => shown.filter((e) => e.from === node || e.to.includes(node));
const scoreOf = (e) => e.score === null ? "not finite" : (e.sign === "hurts" ? "+" : "") + e.score.toPrecision(3);

const found = (element) => nodeOf.get(element) ?? edgeOf.get(element);

function point(event) {
  const what = under(event.clientX, event.clientY, found);
  if (what !== state.focus) focus(what);
  showTip(event, what === null ? null : what.name ? `${what.name}  ${scoreOf(what)}` : state.model.names[what]);
}

function walk(event) {
  const { model } = state, keys = { Left: [-1, 0], Right: [1, 0], Up: [0, -1], Down: [0, 1] };
  const direction = keys[event.key.replace("Arrow", "")];
  if (event.key === "Escape") focus(null);
  if (!direction) return;
  event.preventDefault();
  if (typeof state.focus !== "number") return focus(0);
  const [x, y] = model.lay.place[state.focus], [dx, dy] = direction;
  let nearest = state.focus, least = Infinity;
  model.lay.place.forEach(([px, py], node) => {
    const along = (px - x) * dx + (py - y) * dy, across = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
    if (along < 1 || !model.nodes[node].classList.contains("on") || along + 3 * across >= least) return;
    least = along + 3 * across;
    nearest = node;
  });
  focus(nearest);
}

function choose(model) {
  state.model = model;
  if (state.k !== null) state.k = Math.min(state.k, model.ranked.length) || null;
  for (const e of [...model.ranked, ...model.chosen]) delete e.path;
  for (const key of document.querySelectorAll(".signed")) key.hidden = model.ranking === "exact nodes";
  byId("no-sign").hidden = model.ranking !== "exact nodes";
  drawNodes(model);
  show();
}

byId("k").addEventListener("input", () => { state.k = state.model.stops[byId("k").value] ?? null; show(); });
byId("dangling").addEventListener("change", show);
for (const radio of document.querySelectorAll("[name=view]"))
  radio.addEventListener("change", () => {
    state.k = radio.value === "chosen" ? null : state.model.stops[byId("k").value] ?? null;
    show();
  });
for (const radio of document.querySelectorAll("[name=model]"))
  radio.addEventListener("change", () => choose(models[radio.value]));
byId("graph").addEventListener("pointermove", point);
byId("graph").addEventListener("pointerleave", () => { byId("tip").hidden = true; focus(null); });
byId("graph").addEventListener("keydown", walk);
choose(models[0]);
