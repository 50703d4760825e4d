"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const quiet = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
const percent = (value) => (value === null ? "n/a" : `${(100 * value).toFixed(1)}%`);
const points = (value) => (value === null ? "n/a" : `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)}`);

const formats = {
  text: (value) => value,
  count: (value) => value.toLocaleString("en-GB"),
  p: (value) => (value === null ? "n/a" : value < 0.001 ? "<0.001" : value.toPrecision(2)),
  percent,
  points,
};

// Replace CSS variables in a figure by their current colours: light, dark or print style.
function resolveColours(value, style) {
  if (typeof value === "string") {
    const variable = /^var\((--[a-z]+)\)$/.exec(value);
    return variable ? style.getPropertyValue(variable[1]).trim() : value;
  }
  if (Array.isArray(value)) return value.map((each) => resolveColours(each, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, resolveColours(each, style)]));
  }
  return value;
}

function draw(width) {
  if (typeof Plotly === "undefined") return [];
  const style = getComputedStyle(document.documentElement);
  return Object.entries(data.figures).map(([name, figure]) => {
    const { data: traces, layout } = resolveColours(figure, style);
    const size = width ? { width, autosize: false } : {};
    return Plotly.react(name, traces, { ...layout, ...size }, quiet);
  });
}

function moveStrength(slider) {
  const row = data.strength[Number(slider.value)];
  document.getElementById("strength-value").textContent = row.strength.toFixed(2);
  slider.setAttribute("aria-valuetext", `strength ${row.strength.toFixed(2)}`);
  for (const element of document.querySelectorAll("[data-strength]")) {
    element.textContent = percent(row[element.dataset.strength]);
  }
  const line = data.figures.strength.layout.shapes[0];
  line.x0 = line.x1 = row.strength;
  if (document.body.classList.contains("drawn")) Plotly.relayout("strength", { "shapes[0].x0": row.strength, "shapes[0].x1": row.strength });
}

// Show the classes whose name contains the search text: at most a hundred rows, so that ten thousand classes stay fast.
function showClasses() {
  const search = document.getElementById("find").value.trim().toLowerCase();
  const [column, direction] = document.getElementById("order").value.split(" ").map(Number);
  const sortKey = (row) => (row[column] === null ? Infinity * direction : row[column]);
  const matches = data.classes.filter((row) => row[0].toLowerCase().includes(search));
  matches.sort((a, b) => direction * (sortKey(a) - sortKey(b)) || 0);
  const rows = matches.slice(0, 100).map((row) => {
    const line = document.createElement("tr");
    row.forEach((value, column) => {
      const cell = document.createElement(column === 0 ? "th" : "td");
      cell.textContent = formats[data.formats[column]](value);
      if (column === 0) { cell.scope = "row"; cell.className = "name"; }
      if (column === 1) {
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
  const more = matches.length > rows.length ? `, the first ${rows.length} shown` : "";
  document.getElementById("class-count").textContent = `${matches.length.toLocaleString("en-GB")} of ${data.classes.length.toLocaleString("en-GB")} classes${more}`;
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
// The page gets the A4 layout only after this event, so the chart width in print is fixed.
addEventListener("beforeprint", () => draw(680));
addEventListener("afterprint", () => draw());
