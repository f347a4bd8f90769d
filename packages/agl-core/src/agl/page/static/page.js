"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";

document.getElementById("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  localStorage.setItem("theme", document.documentElement.dataset.theme);
  document.dispatchEvent(new Event("theme"));
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch {
    button.textContent = button.dataset.copy; // No clipboard without TLS: show it.
    return;
  }
  setTimeout(() => { button.textContent = before; }, 1500);
});

/** `/` goes to the first field, `j` and `k` to the next and the previous row of a list. */
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
  const rows = [...document.querySelectorAll("table.list tbody td:first-child a, .columns .card > header a")];
  const place = rows.indexOf(document.activeElement);
  const found = { "/": document.querySelector(".filters input, .filters select"), j: rows[place + 1], k: rows[Math.max(place - 1, 0)] }[event.key];
  if (!found) return;
  event.preventDefault();
  found.focus();
});

function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) time.title = new Date(time.dateTime).toLocaleString();
}
localTimes(document);
document.addEventListener("htmx:afterSettle", () => localTimes(document));

// --- Curves of a run -------------------------------------------------------------------------------------------------

const HUES = [165, 212, 268, 330, 14, 40, 95, 190];
/** Distances of the steps that the axis names: never half a step. */
const STEPS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6].flatMap((size) => [size, 2 * size, 5 * size]);
const charts = document.querySelector("[data-charts]");
let drawn = "";
let plots = [];

/** One row of values for each step of any series. */
function aligned(series) {
  const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const row = new Map(steps.map((step, index) => [step, index]));
  const column = (one, values) => {
    const filled = new Array(steps.length).fill(null);
    one.x.forEach((step, index) => { filled[row.get(step)] = values[index]; });
    return filled;
  };
  return [steps, series.flatMap((one) => [column(one, one.y), ...(one.low ? [column(one, one.low), column(one, one.high)] : [])])];
}

function options(chart, width) {
  const style = getComputedStyle(document.documentElement);
  const axis = { stroke: style.getPropertyValue("--muted"), grid: { stroke: style.getPropertyValue("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
  const shown = [{ label: "step" }];
  const bands = [];
  chart.series.forEach((one, index) => {
    const colour = `hsl(${HUES[index % HUES.length]} 50% ${isDark() ? 62 : 38}%)`;
    const shade = `hsl(${HUES[index % HUES.length]} 50% 50% / 0.14)`;
    // Without a step under the pointer, the last value.
    const number = (plot, value, place, index) => {
      const found = index === null || index === undefined ? plot.data[place].findLast((each) => each !== null) : value;
      if (found === null || found === undefined) return "–";
      return Math.abs(found) >= 999.5 ? Math.round(found).toLocaleString("en") : `${Number(found.toPrecision(3))}`;
    };
    shown.push({ label: one.label, stroke: colour, width: 1.75, value: number, spanGaps: true, points: { show: one.points ?? one.x.length < 3, size: 6, fill: colour }, ...(one.points ? { paths: () => null } : {}) });
    if (!one.low) return;
    const edge = { stroke: "transparent", points: { show: false }, class: "edge", value: number };
    shown.push({ ...edge, label: `${one.label} low` }, { ...edge, label: `${one.label} high` });
    bands.push({ series: [shown.length - 1, shown.length - 2], fill: shade });
  });
  return { width, height: 220, series: shown, bands, scales: { x: { time: false }, y: { range: (_, low, high) => (low === high ? [low, low + 1] : uPlot.rangeNum(low, high, 0.1, true)) } }, axes: [{ ...axis, size: 30, incrs: STEPS }, { ...axis, size: 52 }], legend: { live: true }, cursor: { drag: { x: true, y: false } } };
}

function draw(found) {
  for (const plot of plots) plot.destroy();
  charts.replaceChildren();
  plots = found.map((chart) => {
    const card = document.createElement("section");
    card.className = "card";
    const title = document.createElement("h2");
    title.textContent = chart.title;
    card.append(title);
    charts.append(card);
    const [steps, values] = aligned(chart.series);
    return new uPlot(options(chart, card.clientWidth - 32), [steps, ...values], card);
  });
  if (!found.length) charts.textContent = "No step has ended yet.";
}

async function update(again) {
  if (document.hidden && !again) return;
  const response = await fetch(charts.dataset.charts);
  if (!response.ok) return;
  const text = await response.text();
  if (text === drawn && !again) return;
  drawn = text;
  draw(JSON.parse(text));
}

if (charts) {
  const refresh = (again) => update(again).catch(() => { // The server may be gone for a while.
    if (!plots.length) charts.textContent = "The server does not answer.";
  });
  refresh(true);
  setInterval(() => refresh(false), 5000);
  addEventListener("resize", () => refresh(true));
  document.addEventListener("theme", () => refresh(true));
}
