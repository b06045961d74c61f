/** Charts draw when they come into view, and again when the score, the arm, the theme or the width changes. */
const CHARTS = {};
const seen = new Set();

function layout(extra = {}) {
  const axis = { gridcolor: css("--grid"), zerolinecolor: css("--faint"), zerolinewidth: 1, linecolor: css("--line"), automargin: true, tickfont: { color: css("--soft") }, title: { font: { color: css("--soft"), size: 12.5 }, standoff: 8 } };
  const { xaxis = {}, yaxis = {}, ...rest } = extra;
  const axes = { xaxis: { ...axis, ...xaxis, title: { ...axis.title, ...xaxis.title } }, yaxis: { ...axis, ...yaxis, title: { ...axis.title, ...yaxis.title } } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 320, margin: { l: 56, r: 16, t: 14, b: 46 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: css("--ink") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    showlegend: false,
    ...axes, ...rest,
  };
}
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false };

function draw(figure) {
  const made = CHARTS[figure.dataset.chart](figure);
  if (!made) { figure.hidden = true; return; }
  let target = figure.querySelector(".plot");
  if (!target) figure.append((target = element("div", { class: "plot" })));
  Plotly.react(target, made.traces, layout(made.layout), CONFIG);
}

const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting && !seen.has(entry.target)) { seen.add(entry.target); draw(entry.target); }
}, { rootMargin: "200px" });

function chart(parent, name, draws, title) {
  const figure = element("figure", { class: "chart", "data-chart": name, "aria-label": title }, element("h3", {}, title));
  CHARTS[name] = draws;
  parent.append(figure);
  return figure;
}
const EXTRA = { "copy last frame": "dashed", "VAE ceiling": "dotted", "predicting zero": "dashed", "Pareto front": "solid" };
function legends() {
  for (const place of document.querySelectorAll(".legend")) {
    const chip = (label) => {
      const line = element("i");
      line.style.borderTopColor = colour(label);
      if (ARM[label].placebo) line.style.borderTopStyle = "dotted";
      const toggle = () => { state.hidden.delete(label) || state.hidden.add(label); changed(); };
      return element("button", { type: "button", "aria-pressed": !state.hidden.has(label), onclick: toggle, "data-arm": label }, line, label);
    };
    const extra = (name) => {
      const line = element("i");
      line.style.borderTop = `2px ${EXTRA[name]} ${css("--faint")}`;
      return element("span", {}, line, name);
    };
    const held = document.activeElement?.dataset?.arm;
    const within = place.contains(document.activeElement);
    place.replaceChildren(...methods.map(({ label }) => chip(label)), ...(place.dataset.extra ?? "").split("|").filter(Boolean).map(extra));
    if (within && held) [...place.children].find((one) => one.dataset.arm === held)?.focus();
  }
}
function startCharts() {
  onChange(legends);
  for (const figure of document.querySelectorAll("[data-chart]")) watch.observe(figure);
  onChange(() => seen.forEach(draw));
}

const scoreName = (prefix = "") => {
  const { title, unit } = SCORE[state.score];
  return `${prefix}${title}${unit ? `, ${unit}` : ""}`;
};
const dashed = (label) => (ARM[label]?.placebo ? "dot" : "solid");
const marker = (label, size = 9) => ({ size, color: ARM[label]?.placebo ? css("--card") : colour(label), line: { color: colour(label), width: 2 } });

/** A line with its band as two traces of one legend entry. */
function banded(label, x, curve, name = label) {
  const held = curve.low.every((value) => value !== null);
  const line = { x, y: curve.mean ?? curve.median, name: plain(name), legendgroup: label, mode: "lines", line: { color: colour(label), width: 2, dash: dashed(label) }, hovertemplate: `%{y}<extra>${plain(name)}</extra>` };
  if (!held) return [line];
  const area = { x: [...x, ...[...x].reverse()], y: [...curve.high, ...[...curve.low].reverse()], fill: "toself", fillcolor: rgba(colour(label), 0.1), line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: label, mode: "lines" };
  return [area, line];
}
