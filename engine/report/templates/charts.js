CHARTS.forest = () => {
  const rows = visible().filter((arm) => D.costs.gains[state.score][arm.label]).reverse();
  const { digits, better } = SCORE[state.score];
  const traces = rows.map((arm) => {
    const [mean, low, high] = D.costs.gains[state.score][arm.label];
    return {
      x: [mean], y: [plain(arm.label)], mode: "markers", marker: marker(arm.label, 11), showlegend: false,
      error_x: low === null ? undefined : { type: "data", symmetric: false, array: [high - mean], arrayminus: [mean - low], color: colour(arm.label), thickness: 2, width: 0 },
      hovertemplate: `${signed(mean, digits)}${low === null ? "" : ` [${signed(low, digits)}, ${signed(high, digits)}]`}<extra>${plain(arm.label)}</extra>`,
    };
  });
  return { traces, layout: { height: 78 + 34 * rows.length, margin: { l: 20, r: 20, t: 8, b: 44 }, xaxis: { title: { text: scoreName("difference in ") + (better > 0 ? " (more is better)" : " (less is better)") }, zeroline: true, zerolinewidth: 1.5 }, yaxis: { showgrid: false, type: "category", tickfont: { color: css("--ink"), size: 13 } } } };
};

const spans = (values) => { const positive = values.filter((v) => v > 0); return positive.length === values.length && Math.max(...positive) / Math.min(...positive) > 30; };
/** Where the names of points go: to the side that has room; none where it would lie on another one's. */
function placeLabels(points, better) {
  const extent = (k) => { const values = points.map((point) => point[k]); return [Math.min(...values), Math.max(...values) - Math.min(...values) || 1]; };
  const [[left, width], [low, height]] = [extent(1), extent(2)];
  const taken = [], placed = {};
  for (const [label, x, y] of [...points].sort((a, b) => better * (b[2] - a[2]))) {
    const [u, v] = [(x - left) / width, (y - low) / height];
    const wide = 0.04 + 0.024 * label.length;
    for (const side of u > 0.7 ? ["left", "right"] : ["right", "left"]) {
      const from = side === "right" ? u : u - wide;
      if (side === "right" ? u + wide > 1.12 : from < -0.1) continue;
      if (taken.some(([a, b, h]) => from < b && a < from + wide && Math.abs(h - v) < 0.075)) continue;
      if (points.some(([other, p, q]) => other !== label && Math.abs((q - low) / height - v) < 0.075 && (p - left) / width > from && (p - left) / width < from + wide)) continue;
      taken.push([from, from + wide, v]);
      placed[label] = `middle ${side}`;
      break;
    }
  }
  return placed;
}
function costChart(cost) {
  return (figure) => {
    const { title, spent, fronts } = D.costs.axes[cost];
    const gains = D.costs.gains[state.score];
    const { digits, better } = SCORE[state.score];
    const at = (label) => (label === D.baseline ? [0, null, null] : gains[label]);
    const shown = D.arms.map((arm) => arm.label).filter((label) => !state.hidden.has(label) && spent[label] !== null && at(label));
    const logs = cost === "parameters" && spans(shown.map((label) => spent[label]).filter((value) => value > 0));
    const traces = [];
    const families = {};
    for (const label of shown) if (ARM[label].steps) (families[ARM[label].family] ??= []).push(label);
    for (const labels of Object.values(families).filter((one) => one.length > 1)) {
      labels.sort((a, b) => spent[a] - spent[b]);
      traces.push({ x: labels.map((l) => spent[l]), y: labels.map((l) => at(l)[0]), mode: "lines", line: { color: colour(labels[0]), width: 1.5, dash: "dot" }, hoverinfo: "skip", showlegend: false });
    }
    const front = fronts[state.score].filter((label) => shown.includes(label) && !(logs && spent[label] <= 0));
    traces.push({ x: front.map((l) => spent[l]), y: front.map((l) => at(l)[0]), mode: "lines", line: { color: css("--faint"), width: 5, shape: better > 0 ? "hv" : "hv" }, opacity: 0.35, name: "Pareto front", hoverinfo: "skip" });
    const narrow = figure.clientWidth < 420; // no room for names beside points; the legend tells them
    const named = narrow ? {} : placeLabels(shown.map((label) => [label, logs ? Math.log(Math.max(spent[label], 1)) : spent[label], at(label)[0]]), better);
    for (const label of shown) {
      const [mean, low, high] = at(label);
      traces.push({
        x: [spent[label]], y: [mean], mode: "markers+text", text: [named[label] ? plain(label) : ""], textposition: named[label], textfont: { size: 11, color: css("--soft") }, cliponaxis: false, name: plain(label), marker: marker(label),
        error_y: low === null ? undefined : { type: "data", symmetric: false, array: [high - mean], arrayminus: [mean - low], color: rgba(colour(label), 0.55), thickness: 1.5, width: 0 },
        hovertemplate: `${signed(mean, digits)} at %{x:,.4~g}<extra>${plain(label)}</extra>`,
      });
    }
    return { traces, layout: { xaxis: { title: { text: title }, type: logs ? "log" : "linear", rangemode: logs ? "normal" : "tozero" }, yaxis: { title: { text: scoreName("difference in ") }, autorange: better > 0 ? true : "reversed" } } };
  };
}
const COST_TITLES = { adapt: "Quality against seconds of adaptation", total: "Quality against seconds in all", memory: "Quality against memory", parameters: "Quality against parameters" };
for (const cost of Object.keys(D.costs.axes)) chart($("costs"), `cost-${cost}`, costChart(cost), COST_TITLES[cost]);

function frameChart(which, references) {
  return () => {
    const held = D.frames.scores[state.score];
    if (!held) return null;
    const traces = [];
    const first = D.frames.first;
    for (const [label, curves] of Object.entries(held.arms)) {
      const curve = curves[which];
      if (!curve || state.hidden.has(label)) continue;
      const lines = banded(label, curve.mean.map((_, k) => first + k), curve);
      traces.push(...(references ? lines.slice(-1) : lines)); // bands of scores would hide each other: clips differ more than arms
    }
    if (references)
      Object.entries(held.references).forEach(([name, values], k) =>
        traces.push({ x: values.map((_, j) => first + j), y: values, name, mode: "lines", line: { color: css("--faint"), width: 1.5, dash: k ? "dot" : "dash" } }));
    const shapes = D.frames.seams.map((frame) => ({ type: "line", x0: frame - 0.5, x1: frame - 0.5, yref: "paper", y0: 0, y1: 1, line: { color: css("--faint"), width: 1, dash: "dot" } }));
    const annotations = D.frames.seams.map((frame) => ({ x: frame - 0.5, y: 1, yref: "paper", yanchor: "bottom", text: "chunk seam", showarrow: false, font: { size: 11, color: css("--faint") } }));
    return { traces, layout: { margin: { l: 56, r: 16, t: 26, b: 46 }, shapes, annotations, hovermode: "x unified", xaxis: { title: { text: "frame" } }, yaxis: { title: { text: scoreName(which === "gain" ? "difference in " : "") } } } };
  };
}
CHARTS.frameGain = frameChart("gain", false);
CHARTS.frameScore = frameChart("value", true);

const gainsOf = (label) => (D.clips.gains[label] ?? {})[state.score] ?? [];
CHARTS.sorted = () => {
  const traces = [];
  for (const { label } of visible()) {
    const values = gainsOf(label).filter((value) => value !== null).sort((a, b) => b - a);
    if (values.length)
      traces.push({ x: values.map((_, k) => (100 * (k + 0.5)) / values.length), y: values, name: plain(label), mode: values.length < 40 ? "lines+markers" : "lines", marker: { size: 4 }, line: { color: colour(label), width: label === state.arm ? 3 : 1.5, dash: dashed(label) }, opacity: label === state.arm ? 1 : 0.65, hovertemplate: `%{y}<extra>${plain(label)}</extra>` });
  }
  return { traces, layout: { xaxis: { title: { text: "clips, from largest to smallest difference, %" }, range: [0, 100] }, yaxis: { title: { text: scoreName("difference in ") } } } };
};
CHARTS.kind = () => {
  const kinds = Object.keys(D.kinds);
  if (!kinds.length) return null;
  const name = state.kind ?? kinds[0];
  const x = [], y = [], text = [];
  gainsOf(state.arm).forEach((gain, k) => {
    const value = D.clips.kinds[name][k];
    if (gain !== null && value !== null) { x.push(value); y.push(gain); text.push(plain(D.clips.id[k])); }
  });
  return { traces: [{ x, y, text, mode: "markers", marker: { color: rgba(colour(state.arm), x.length > 300 ? 0.35 : 0.75), size: x.length > 300 ? 5 : 8 }, hovertemplate: "%{text}<br>%{y}<extra></extra>", showlegend: false }], layout: { xaxis: { title: { text: D.kinds[name] } }, yaxis: { title: { text: scoreName("difference in ") } } } };
};
CHARTS.categories = (figure) => {
  const found = {};
  gainsOf(state.arm).forEach((gain, k) => { if (gain !== null && D.clips.category[k]) (found[D.clips.category[k]] ??= []).push(gain); });
  const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];
  const sign = SCORE[state.score].better;
  const names = Object.keys(found).sort((a, b) => sign * (median(found[b]) - median(found[a])));
  figure.style.minWidth = `${Math.max(300, 60 + 26 * names.length)}px`;
  const traces = names.map((name) => ({ type: "box", y: found[name], name: plain(name), marker: { color: colour(state.arm), size: 3 }, line: { width: 1.2 }, boxpoints: found[name].length < 25 ? "all" : "outliers", jitter: 0.4, pointpos: 0, showlegend: false }));
  return { traces, layout: { height: 400, xaxis: { tickangle: -60 }, yaxis: { title: { text: `${plain(state.arm)}: ${scoreName("difference in ")}` } } } };
};

const STEP_CURVES = { losses: "Loss", gradient_norms: "Gradient norm", penalties: "Penalty", distances: "Distance from the start", fixed_losses: "Loss on fixed draws, mean over noise levels", kl: "KL divergence from the base network, nats", held_out: "Loss on held-out draws", forgetting: "Forgetting: loss on held-out clips" };
function stepChart(name) {
  return () => {
    const traces = [];
    let zero = null;
    for (const { label } of visible()) {
      const curves = D.steps[label] ?? {};
      if (curves[name]) traces.push(...banded(label, curves[name].at, curves[name]));
      if (name === "losses" && curves.zero_losses && curves.zero_losses.at.length > (zero?.at.length ?? 0)) zero = curves.zero_losses;
    }
    if (zero) traces.push({ x: zero.at, y: zero.median, name: "predicting zero", mode: "lines", line: { color: css("--faint"), dash: "dash", width: 1.5 } });
    return { traces, layout: { xaxis: { title: { text: "steps taken" } }, yaxis: { title: { text: STEP_CURVES[name].split(",")[0] }, rangemode: "tozero" } } };
  };
}
if ($("steps"))
  for (const name of Object.keys(STEP_CURVES))
    if (methods.some(({ label }) => (D.steps[label]?.[name]?.median.length ?? 0) > 1)) chart($("steps"), `steps-${name}`, stepChart(name), STEP_CURVES[name]);

D.searches.forEach((search, k) => {
  chart($("searches"), `search-${k}`, () => ({
    traces: [{ type: "heatmap", x: search.x.map(String), y: search.y.map(String), z: search.z, text: search.text.map((row) => row.map((text) => plain(text).replace("\n", "<br>"))), texttemplate: "%{text}", hovertemplate: `${plain(search.x_name)} %{x}, ${plain(search.y_name)} %{y}: %{z}<extra></extra>`, zmid: 0, colorscale: [[0, css("--bad")], [0.5, css("--card")], [1, css("--good")]], reversescale: search.better < 0, xgap: 2, ygap: 2, colorbar: { thickness: 10, tickfont: { color: css("--soft") } } }],
    layout: { xaxis: { type: "category", title: { text: plain(search.x_name) }, showgrid: false }, yaxis: { type: "category", title: { text: plain(search.y_name) }, showgrid: false }, shapes: (search.chosen ?? []).map(([i, j]) => ({ type: "rect", x0: i - 0.5, x1: i + 0.5, y0: j - 0.5, y1: j + 0.5, line: { color: css("--ink"), width: 2 } })) },
  }), search.title);
});

options($("arm"), methods.map(({ label }) => [label, label]), state.arm);
$("arm").addEventListener("change", () => { state.arm = $("arm").value; changed(); });
const kindFigure = document.querySelector('[data-chart="kind"]');
if (Object.keys(D.kinds).length > 1) {
  const select = element("select", { "aria-label": "Kind of clip" });
  options(select, Object.entries(D.kinds), Object.keys(D.kinds)[0]);
  select.addEventListener("change", () => { state.kind = select.value; draw(kindFigure); });
  kindFigure.append(select);
}
startCharts();
