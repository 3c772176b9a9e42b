"use strict";

const charts = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("screen and (prefers-color-scheme: dark)");
const narrow = matchMedia("screen and (max-width: 48rem)");
const print = matchMedia("print");

// What the controls and the legend of a chart say.
function state(section) {
  const value = (name) => section.querySelector(`[name="${name}"]`);
  const buttons = section.querySelectorAll("[data-series]");
  return {
    x: value("x").value,
    y: value("y").value,
    logX: value("log-x").checked,
    logY: value("log-y").checked,
    band: value("band")?.checked ?? false,
    shown: [...buttons].filter((b) => b.getAttribute("aria-pressed") === "true")
      .map((b) => Number(b.dataset.series)),
  };
}

// The curve of a series, and the band below it.
function traces(series, now, isDark) {
  const x = series.x[now.x], y = series.y[now.y];
  if (!x || !y) return [];
  const color = isDark ? series.dark : series.color;
  const [mean, low, high] = y;
  const drawn = (value, log) => value !== null && (!log || value > 0);
  const kept = [...x.keys()].filter((i) =>
    drawn(x[i], now.logX) && drawn(low[i], now.logY) && drawn(high[i], now.logY));
  const back = [...kept].reverse();
  const band = {
    x: [...kept, ...back].map((i) => x[i]),
    y: [...kept.map((i) => high[i]), ...back.map((i) => low[i])],
    mode: "lines",
    line: { width: 0 },
    fill: "toself",
    fillcolor: color,
    opacity: 0.15,
    hoverinfo: "skip",
  };
  const range = low.some((value, i) => value !== high[i]);
  const line = {
    x,
    y: mean,
    name: series.name,
    customdata: x.map((_, i) => [low[i], high[i]]),
    mode: "lines+markers",
    line: { color, dash: series.dash, width: 2 },
    marker: { color, symbol: series.marker, size: 8, maxdisplayed: 12 },
    hovertemplate:
      `<b>${series.name}</b>${series.note ? `, ${series.note}` : ""}<br>` +
      `${now.x}: %{x:.6~g}<br>${now.y}: %{y:.4~g}` +
      (range ? "<br>seeds: %{customdata[0]:.4~g} to %{customdata[1]:.4~g}" : "") +
      "<extra></extra>",
  };
  return now.band && range && kept.length > 1 ? [band, line] : [line];
}

function axis(title, log, ink, rule) {
  return {
    title: { text: title },
    type: log ? "log" : "linear",
    color: ink,
    gridcolor: rule,
    linecolor: rule,
    zeroline: false,
    automargin: true,
    tickformat: log ? "~g" : "",
    nticks: log ? 4 : 0,
  };
}

function draw(section) {
  const now = state(section), plot = section.querySelector(".plot");
  const chart = charts[section.dataset.chart];
  const page = getComputedStyle(document.documentElement);
  const [ink, rule, card] = ["--ink", "--rule", "--card"].map((n) => page.getPropertyValue(n));
  const layout = {
    xaxis: axis(now.x, now.logX, ink, rule),
    yaxis: axis(now.y, now.logY, ink, rule),
    font: { family: "system-ui, sans-serif", size: narrow.matches ? 12 : 13, color: ink },
    margin: { l: 50, r: 12, t: 12, b: 48 },
    paper_bgcolor: card,
    plot_bgcolor: card,
    hoverlabel: { bgcolor: card, font: { color: ink }, align: "left" },
    hovermode: "closest",
    // On phones, dragging scrolls the page.
    dragmode: narrow.matches ? false : "zoom",
    showlegend: false,
    // Zoom stays when curves come and go, but not when the axes change.
    uirevision: JSON.stringify([now.x, now.y, now.logX, now.logY]),
  };
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const shown = now.shown.map((i) => chart.series[i]);
  const drawn = shown.map((series) => traces(series, now, dark.matches));
  // Bands first, so that no band covers a line.
  const sorted = [...drawn.filter((t) => t.length > 1).map((t) => t[0]),
    ...drawn.flatMap((t) => t.slice(-1))];
  plot.setAttribute("aria-label",
    `Line chart of ${now.y} against ${now.x}: ${shown.map((s) => s.name).join(", ")}.`);
  return Plotly.react(plot, sorted, layout, config);
}

// Quantities that the experiment shows on log axes begin with log axes.
function reset(section, name) {
  const option = section.querySelector(`[name="${name}"]`).selectedOptions[0];
  section.querySelector(`[name="log-${name}"]`).checked = "log" in option.dataset;
}

function press(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", pressed);
}

function connect(section) {
  reset(section, "x");
  reset(section, "y");
  section.addEventListener("change", (event) => {
    if (event.target.name === "x" || event.target.name === "y") {
      reset(section, event.target.name);
    }
    draw(section);
  });
  section.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button || button.closest(".plot")) return;
    const pressed = (b) => b.getAttribute("aria-pressed") === "true";
    if (button.dataset.all) {
      press(section.querySelectorAll("[data-series]"), button.dataset.all);
    } else if (button.dataset.series) {
      press([button], !pressed(button));
    } else {
      const members = [...button.parentElement.querySelectorAll("[data-series]")];
      press(members, !members.every(pressed));
    }
    draw(section);
  });
}

async function start() {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  const sections = [...document.querySelectorAll(".chart")];
  sections.forEach(connect);
  const redraw = () => Promise.all(sections.map(draw));
  await redraw();
  for (const query of [dark, narrow, print]) query.addEventListener("change", redraw);
  document.documentElement.dataset.ready = "";
}

start();
