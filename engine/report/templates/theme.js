"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const SCORE = Object.fromEntries(D.scores.map((score) => [score.name, score]));
const ARM = Object.fromEntries(D.arms.map((arm) => [arm.label, arm]));
const methods = D.arms.filter((arm) => arm.label !== D.baseline);
const state = { score: D.frameScores[0], arm: D.focus, hidden: new Set() };
const visible = () => methods.filter((arm) => !state.hidden.has(arm.label));
const listeners = [];
const onChange = (listener) => listeners.push(listener);
const changed = () => listeners.forEach((listener) => listener());

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([key, text]) => element("option", { value: key }, text)));
  select.value = value;
}

const own = methods.filter((arm) => !arm.placebo).map((arm) => arm.label);
function colour(label) {
  const at = own.indexOf(ARM[label]?.placebo ? ARM[label].parent : label);
  return css(at < 0 ? "--c0" : `--c${1 + (at % 8)}`);
}
const rgba = (hex, alpha) => `rgba(${[1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)).join(",")},${alpha})`;
const signed = (value, digits) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits);
/** Text for Plotly, which reads a few tags in labels. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  changed();
});

$("score").append(
  ...D.frameScores.map((name) =>
    element("button", {
      type: "button", role: "radio", "data-score": name, "aria-checked": name === state.score,
      onclick: () => { state.score = name; changed(); },
    }, SCORE[name].title)));
$("score").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const names = D.frameScores;
  state.score = names[(names.indexOf(state.score) + step + names.length) % names.length];
  changed();
  $("score").querySelector('[aria-checked="true"]').focus();
});
onChange(() => {
  for (const button of $("score").children) {
    const chosen = button.dataset.score === state.score;
    button.setAttribute("aria-checked", chosen);
    button.tabIndex = chosen ? 0 : -1;
  }
});
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "t") $("theme").click();
  if (event.key === "/" && $("controls")) { event.preventDefault(); $("controls").elements.text.focus(); }
});
