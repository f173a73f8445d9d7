// ---- Heads: what a cell, a row and a search know of one
const models = data.models, KINDS = data.kinds;
const HUES = { self: 140, first: 45, previous: 210, same: 285, induction: 340, delimiter: 95, offset: 180 };
const LETTERS = { self: "s", first: "f", previous: "p", same: "=", induction: "i", delimiter: ".", offset: "o" };
const ROWS = 400; // of the list
const state = { layer: 0, head: 0, search: "", by: null };
const cellOf = new WeakMap();
const reading = (h) => h.edges ?? h.mass;
const nameOf = (h) => `${h.layer}.${h.head}`;
const percent = (x) => `${+(100 * x).toPrecision(3)} %`;
const kindName = (name, r) => (name === "offset" && r.offset ? `offset ${r.offset}` : name);
const leading = (r) => r.labels[0] ?? KINDS.reduce((a, b) => (excess(r, b) > excess(r, a) ? b : a));
const excess = (r, name) => r.kinds[name].share - r.kinds[name].control;
const same = (h, at = state) => h.layer === at.layer && h.head === at.head;

// A head is found by its name, by its labels, and by the first letters of the tokens in its examples and values.
function words(h) {
  const found = h.examples.flatMap((e) => [tokenAt(e, e.key), tokenAt(e, e.query)]);
  for (const d of h.directions) found.push(...d.raises, ...d.lowers);
  return new Set(found.map(plain));
}
const plain = (token) => token.replaceAll("·", " ").trim().toLowerCase();
const tokenAt = (e, position) => {
  const piece = e.text.find((w) => position >= w.start && position < w.start + w.tokens.length);
  return piece.tokens[position - piece.start];
};
function matches(h) {
  const q = plain(state.search);
  if (!q) return true;
  if (/^\d+\.\d*$/.test(q)) return q.endsWith(".") ? nameOf(h).startsWith(q) : nameOf(h) === q;
  const labels = h.open === 0 ? ["closed"] : reading(h).labels.length ? reading(h).labels : ["no label"];
  h.words ??= words(h);
  return labels.some((l) => l.startsWith(q)) || [...h.words].some((w) => w.startsWith(q));
}

// ---- Grids
function drawGrids() {
  const box = byId("grids");
  box.replaceChildren();
  const wide = box.clientWidth, columns = models.length > 1 && wide > 700 ? 2 : 1;
  for (const model of models) {
    const part = make(box, "div"), n = model.heads_per_layer, left = 26, top = 16;
    make(part, "h2", {}, model.kind).append(make(part, "span", { class: "dim" }, ` ${model.name}`));
    const column = clamp((wide / columns - left - 20) / n, 7, 34), row = clamp(520 / model.layers, 9, 22);
    const width = left + column * n + 2, height = top + row * model.layers + 2;
    const svg = make(part, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    for (let h = 0; h < n; h += Math.ceil(16 / column))
      make(svg, "text", { x: left + column * (h + 0.5), y: 11, "text-anchor": "middle" }, h);
    for (let l = 0; l < model.layers; l += Math.ceil(12 / row))
      make(svg, "text", { x: left - 6, y: top + row * (l + 0.5) + 4, "text-anchor": "end" }, l);
    const most = Math.max(...model.heads.map((h) => h.open));
    for (const h of model.heads) {
      const r = reading(h), label = r.labels[0], x = left + column * h.head, y = top + row * h.layer;
      const kind = h.open === 0 ? "closed" : label ? "labelled" : "";
      h.cell = make(svg, "rect", { class: `cell ${kind}`, x: x + 1, y: y + 1, width: column - 2, height: row - 2, rx: 2 });
      h.cell.style.setProperty("--hue", HUES[label] ?? 0);
      if (h.edges && h.open) h.cell.style.fillOpacity = clamp(1 + Math.log10(h.open / most) / 3, 0.3, 1); // decades
      cellOf.set(h.cell, { h, model });
      if (!label || column < 11 || row < 11) continue;
      const letter = label === "offset" && column > 20 ? r.offset : LETTERS[label];
      h.letter = make(svg, "text", { class: "letter", x: x + column / 2, y: y + row / 2 + 4 }, letter);
    }
  }
}

function drawKey() {
  const key = byId("kinds"), used = new Set(models.flatMap((m) => m.heads.flatMap((h) => reading(h).labels.slice(0, 1))));
  const entry = (name, letter, attributes) => make(key, "span").append(make(key, "i", attributes, letter), ` ${name}`);
  for (const name of KINDS) if (used.has(name)) entry(name, LETTERS[name], { style: `--hue: ${HUES[name]}` });
  entry("no label", "\u00a0", { class: "plain" });
  if (models.some((m) => m.closed.length)) entry("closed", "\u00a0", { class: "none" });
  if (models.some((m) => m.kind === "sparse")) make(key, "span", {}, "paler: opens less");
}

// ---- Dossiers
function dossiers() {
  const box = byId("dossiers");
  box.replaceChildren();
  const cards = models.map(() => make(box, "article", { class: "card" })); // all of them: charts ask for their width
  models.forEach((model, i) => dossier(model, cards[i]));
}

function dossier(model, box) {
  const h = model.heads.find((x) => same(x)), r = reading(h);
  make(box, "h2", {}, `${nameOf(h)} ${model.kind}`);
  const tags = make(box, "p");
  for (const label of r.labels)
    make(tags, "span", { class: "tag", style: `--hue: ${HUES[label]}` }, kindName(label, r));
  tags.append(make(tags, "span", { class: "dim" }, told(model, h)));
  if (h.open > 0) kinds(box, h);
  if (h.open > 0) distances(box, r, h.edges ? "open edges" : "attention mass");
  if (h.examples.length) examples(box, h);
  directions(box, h);
}

function told(model, h) {
  if (h.open === 0) return "closed: no edge is open in this text";
  if (!h.edges) return h.mass.labels.length ? "by attention mass" : "no label, by attention mass";
  const often = `${percent(h.open / h.visible)} of its pairs open (${h.open.toLocaleString()})`;
  return `${often}, ${+h.edges_per_query.toPrecision(3)} per query; ${percent(h.queries)} of the queries have one`;
}

function kinds(box, h) {
  const readings = h.edges ? [["open edges", h.edges], ["mass", h.mass]] : [["mass", h.mass]];
  const table = make(make(box, "div", { class: "wide" }), "table", { class: "kinds" });
  const head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  make(head, "th", {}, "kind");
  for (const [name] of readings) {
    make(head, "th", {}, name);
    make(head, "th", { class: "num" }, "share");
    make(head, "th", { class: "num" }, "control");
  }
  for (const kind of KINDS) {
    const row = make(body, "tr");
    make(row, "td", { title: data.definitions[kind] }, kindName(kind, reading(h)));
    for (const [, r] of readings) {
      const { share, control } = r.kinds[kind];
      const meter = make(make(row, "td"), "span", { class: r.labels.includes(kind) ? "meter is" : "meter" });
      make(meter, "i").style.width = `${100 * share}%`;
      make(meter, "b").style.left = `${100 * control}%`;
      make(row, "td", { class: "num" }, percent(share));
      make(row, "td", { class: "num dim" }, percent(control));
    }
  }
}

function distances(box, r, what) {
  make(box, "h3", {}, `Distance in tokens, share of the ${what}`);
  const frame = make(box, "div", { class: "distances" }), width = clamp(frame.clientWidth, 200, 700), bottom = 66;
  const step = width / r.distances.length, most = Math.max(...r.distances);
  const height = step < 7 * `${data.edges.at(-2)}-${data.edges.at(-1) - 1}`.length ? 96 : 84; // two lines
  const svg = make(frame, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img" });
  r.distances.forEach((share, i) => {
    const [low, high] = [data.edges[i], data.edges[i + 1] - 1], size = (bottom - 14) * (share / most);
    const bar = make(svg, "rect", { class: "bar", x: i * step + 2, y: bottom - size, width: step - 4, height: size });
    const name = low === high ? `${low}` : `${low}-${high}`;
    make(bar, "title", {}, `${name}: ${percent(share)}`);
    const at = { x: (i + 0.5) * step, "text-anchor": "middle" };
    const fits = low === high || step >= 7 * name.length;
    const label = make(svg, "text", { ...at, y: 79 }, fits ? name : `${low}-`);
    if (!fits) make(label, "tspan", { x: at.x, dy: 12 }, high);
    if (share >= 0.005) make(svg, "text", { ...at, y: bottom - size - 3 }, `${Math.round(100 * share)} %`);
  });
}

function examples(box, h) {
  make(box, "h3", {}, "Strongest edges: the query reads the key").append(
    " (", make(box, "mark", { class: "to" }, "query"), " ", make(box, "mark", { class: "from" }, "key"), ")");
  const table = make(make(box, "table"), "tbody");
  for (const e of h.examples) {
    const row = make(table, "tr"), cell = make(row, "td", { class: "window" });
    e.text.forEach((w, i) => {
      if (i) cell.append(" … ");
      w.tokens.forEach((token, j) => {
        const at = w.start + j, role = at === e.key ? (at === e.query ? "both" : "from") : at === e.query ? "to" : null;
        if (role) make(cell, "mark", { class: role, title: `position ${at}` }, token);
        else cell.append(token);
      });
    });
    const place = `block ${e.block}, query ${e.query}, key ${e.key}; weight times norm ${e.strength.toPrecision(3)}`;
    make(row, "td", { class: "num", title: place }, e.weight.toFixed(2));
  }
}

function directions(box, h) {
  make(box, "h3", {}, "What it can write: directions of its value map, as tokens");
  const table = make(box, "table"), body = make(table, "tbody");
  h.directions.forEach((d) => {
    for (const [sign, tokens] of [["+", d.raises], ["−", d.lowers]]) {
      const row = make(body, "tr");
      make(row, "td", { class: "num", title: "share of the squared norm of W_V W_O" }, sign === "+" ? percent(d.share) : "");
      make(row, "td", {}, sign);
      make(row, "td", { class: "words" }, tokens.join("  "));
    }
  });
}

// ---- List: name of a column, its text, what it sorts by, whether it is a number
const first = models[0], second = models[1];
const other = (h) => second.heads[h.layer * second.heads_per_layer + h.head];
const ranks = (r) => (r.labels.length ? -KINDS.indexOf(r.labels[0]) : -KINDS.length);
const labelsOf = (r) => r.labels.map((l) => kindName(l, r)).join(", ") || "–";
const near = (h, r = reading(h)) => r.kinds[leading(reading(h))];
const unless = (text) => (h) => (h.open === 0 ? "" : text(h));
const COLUMNS = [
  ["head", nameOf, (h) => -(h.layer * 1e4 + h.head), false],
  ...(first.kind === "sparse" ? [
    ["open", (h) => percent(h.open / h.visible), (h) => h.open, true],
    ["per query", (h) => `${+h.edges_per_query.toPrecision(3)}`, (h) => h.open, true],
    ["queries", (h) => percent(h.queries), (h) => h.queries, true],
  ] : []),
  ["label", (h) => (h.open === 0 ? "closed" : labelsOf(reading(h))), (h) => ranks(reading(h)), false],
  ["nearest kind", unless((h) => kindName(leading(reading(h)), reading(h))), (h) => -KINDS.indexOf(leading(reading(h))), false],
  ["share", unless((h) => percent(near(h).share)), (h) => near(h).share, true],
  ["control", unless((h) => percent(near(h).control)), (h) => near(h).control, true],
  ...(second ? [
    [`${second.kind}: label`, (h) => labelsOf(other(h).mass), (h) => ranks(other(h).mass), false],
    [`${second.kind}: share`, unless((h) => percent(near(h, other(h).mass).share)), (h) => near(h, other(h).mass).share, true],
  ] : []),
];

function fill() {
  const box = byId("list");
  box.replaceChildren();
  const table = make(box, "table"), head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  COLUMNS.forEach(([name, , , isNumber], i) => {
    const cell = make(head, "th", isNumber ? { class: "num" } : {}, name);
    cell.addEventListener("click", () => { state.by = i; fill(); });
  });
  const by = COLUMNS[state.by ?? (first.kind === "sparse" ? 1 : COLUMNS.findIndex((c) => c[0] === "share"))][2];
  const heads = first.heads.filter((h) => matches(h) || (second && matches(other(h)))).sort((a, b) => by(b) - by(a));
  for (const h of heads.slice(0, ROWS)) {
    const row = make(body, "tr", same(h) ? { class: "chosen" } : {});
    for (const [, text, , isNumber] of COLUMNS) make(row, "td", isNumber ? { class: "num" } : {}, text(h));
    row.addEventListener("click", () => choose(h));
  }
  if (heads.length > ROWS) make(box, "p", { class: "dim" }, `and ${heads.length - ROWS} more`);
}

// ---- State
function choose({ layer, head }) {
  Object.assign(state, { layer, head });
  dossiers();
  mark();
  fill();
}

function mark() {
  for (const model of models)
    for (const h of model.heads) {
      h.cell.classList.toggle("chosen", same(h));
      h.cell.classList.toggle("out", !matches(h));
      h.letter?.classList.toggle("out", !matches(h));
    }
}

function search() {
  state.search = byId("search").value;
  const counts = models.map((m) => `${m.heads.filter(matches).length.toLocaleString()} ${m.kind}`);
  byId("matches").textContent = state.search.trim() ? `${counts.join(", ")} heads` : "";
  const hit = state.search.trim() && first.heads.concat(second?.heads ?? []).find(matches);
  if (/^\s*\d+\.\d+\s*$/.test(state.search) && hit) return choose(hit);
  mark();
  fill();
}

const found = (element) => cellOf.get(element);
function tipOf({ h }) {
  const r = reading(h), labels = r.labels.map((l) => `${kindName(l, r)} ${percent(r.kinds[l].share)}`).join(", ");
  if (h.open === 0) return `${nameOf(h)}  closed`;
  return `${nameOf(h)}  ${h.edges ? `${percent(h.open / h.visible)} open  ` : ""}${labels || "no label"}`;
}

function walk(event) {
  const [dl, dh] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
  if (dl === undefined) return;
  event.preventDefault();
  choose({ layer: clamp(state.layer + dl, 0, first.layers - 1), head: clamp(state.head + dh, 0, first.heads_per_layer - 1) });
}

byId("search").addEventListener("input", search);
byId("grids").addEventListener("pointermove", (event) => {
  const at = found(event.target);
  showTip(event, at ? tipOf(at) : null);
});
byId("grids").addEventListener("pointerleave", (event) => showTip(event, null));
byId("grids").addEventListener("click", (event) => { const at = found(event.target); if (at) choose(at.h); });
byId("grids").addEventListener("keydown", walk);
addEventListener("resize", () => { drawGrids(); dossiers(); mark(); });
drawGrids();
drawKey();
choose(first.kind === "sparse" ? first.heads.reduce((a, b) => (b.open > a.open ? b : a)) : first.heads.reduce((a, b) =>
  (excess(b.mass, leading(b.mass)) > excess(a.mass, leading(a.mass)) ? b : a)));
