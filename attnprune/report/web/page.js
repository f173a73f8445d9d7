"use strict";
// What every page's script begins with: its data, and how elements are made and found.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

function make(parent, tag, attributes = {}, text) {
  const svg = tag === "svg" || parent.namespaceURI.endsWith("svg");
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// The axis of counts below a curve, logarithmic: marks at 1, 2, 5, 10, ..., or at powers alone where there are many.
function ticks(svg, least, most, px, bottom, width) {
  const ratio = most / least, counts = [];
  for (let unit = 1; unit <= most; unit *= ratio > 1e4 ? 100 : 10)
    for (const step of ratio > 200 ? [1] : [1, 2, 5])
      if (unit * step >= least && unit * step <= most) counts.push(unit * step);
  for (const count of counts.length > 1 ? counts : [least, most]) {
    const x = px(count), isLast = x > width - 24;
    make(svg, "line", { class: "axis", x1: x, x2: x, y1: bottom, y2: bottom + 4 });
    make(svg, "text", { x: isLast ? width : x, y: bottom + 16, "text-anchor": isLast ? "end" : "middle" }, count.toLocaleString());
  }
}

// What `find` knows of the elements under the pointer, or up to 5 pixels off: thin lines are hard to hit.
function under(x, y, find) {
  for (const reach of [0, 2, 4])
    for (const [dx, dy] of reach ? [[0, -1], [0, 1], [-1, 0], [1, 0], [-1, -1], [1, 1], [-1, 1], [1, -1]] : [[0, 0]]) {
      const element = document.elementFromPoint(x + dx * reach, y + dy * reach);
      const found = element && find(element);
      if (found !== undefined && found !== null) return found;
    }
  return null;
}

function showTip(event, text) {
  const tip = byId("tip");
  tip.hidden = text === null;
  if (text === null) return;
  tip.textContent = text;
  tip.style.left = `${clamp(event.clientX + 14, 0, Math.max(innerWidth - tip.offsetWidth - 8, 0))}px`;
  tip.style.top = `${event.clientY + 16}px`;
}
