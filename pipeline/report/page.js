"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const quiet = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
const percent = (value) => (value === null ? "n/a" : `${(100 * value).toFixed(1)}%`);
const points = (value) => (value === null ? "n/a" : `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)}`);

const forms = {
  text: (value) => value,
  count: (value) => value.toLocaleString("en-GB"),
  p: (value) => (value === null ? "n/a" : value < 0.001 ? "<0.001" : value.toPrecision(2)),
  percent,
  points,
};

// A figure names the page's colours; the browser knows what they are now, in light, in dark or on paper.
function coloured(value, style) {
  if (typeof value === "string") {
    const found = /^var\((--[a-z]+)\)$/.exec(value);
    return found ? style.getPropertyValue(found[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((each) => coloured(each, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, coloured(each, style)]));
  }
  return value;
}

function draw(width) {
  if (typeof Plotly === "undefined") return [];
  const style = getComputedStyle(document.documentElement);
  return Object.entries(data.figures).map(([name, figure]) => {
    const { data: traces, layout } = coloured(figure, style);
    const size = width ? { width, autosize: false } : {};
    return Plotly.react(name, traces, { ...layout, ...size }, quiet);
  });
}

function moveStrength(slider) {
  const row = data.strength[Number(slider.value)];
  document.getElementById("strength-value").textContent = row.strength.toFixed(2);
  slider.setAttribute("aria-valuetext", `strength ${row.strength.toFixed(2)}`);
  for (const place of document.querySelectorAll("[data-strength]")) {
    place.textContent = percent(row[place.dataset.strength]);
  }
  const line = data.figures.strength.layout.shapes[0];
  line.x0 = line.x1 = row.strength;
  if (document.body.classList.contains("drawn")) Plotly.relayout("strength", { "shapes[0].x0": row.strength, "shapes[0].x1": row.strength });
}

// The rows of the class table that match what was typed: at most a hundred, so that ten thousand classes stay quick.
function showClasses() {
  const wanted = document.getElementById("find").value.trim().toLowerCase();
  const [column, direction] = document.getElementById("order").value.split(" ").map(Number);
  const worth = (row) => (row[column] === null ? Infinity * direction : row[column]);
  const found = data.classes.filter((row) => row[0].toLowerCase().includes(wanted));
  found.sort((a, b) => direction * (worth(a) - worth(b)) || 0);
  const rows = found.slice(0, 100).map((row) => {
    const line = document.createElement("tr");
    row.forEach((value, place) => {
      const cell = document.createElement(place === 0 ? "th" : "td");
      cell.textContent = forms[data.forms[place]](value);
      if (place === 0) { cell.scope = "row"; cell.className = "name"; }
      if (place === 1) {
        const key = document.createElement("span");
        key.className = `key ${value}`;
        cell.prepend(key);
        cell.className = "text";
      }
      line.append(cell);
    });
    return line;
  });
  document.getElementById("classes").replaceChildren(...rows);
  const more = found.length > rows.length ? `, the first ${rows.length} shown` : "";
  document.getElementById("found").textContent = `${found.length.toLocaleString("en-GB")} of ${data.classes.length.toLocaleString("en-GB")} classes${more}`;
}

const slider = document.getElementById("strength-slider");
if (slider) {
  slider.addEventListener("input", () => moveStrength(slider));
  moveStrength(slider);
}
if (document.getElementById("find")) {
  document.getElementById("find").addEventListener("input", showClasses);
  document.getElementById("order").addEventListener("change", showClasses);
  showClasses();
}
Promise.all(draw()).then(() => document.body.classList.add("drawn"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
// On paper a chart is as wide as its column there: the page is laid out for A4 only after this event.
addEventListener("beforeprint", () => draw(680));
addEventListener("afterprint", () => draw());
