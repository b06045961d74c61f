const PAGE = 12;

/** Videos that play in step: the first leads, the others are held to its clock. */
class Step {
  constructor(videos, fps, show) {
    Object.assign(this, { videos, fps, show, playing: false });
    this.lead = videos[0];
    this.lead.addEventListener("ended", () => this.playing && this.restart());
    // The last frame, where videos have drifted apart the most, stands until somebody plays.
    for (const video of videos) video.addEventListener("loadedmetadata", () => { if (!this.playing) this.seek(Infinity); });
  }
  get duration() { return this.lead.duration || 0; }
  async play() {
    if (this.playing) return;
    this.playing = true;
    this.show();
    if (this.lead.ended || this.duration - this.lead.currentTime < 0.5 / this.fps) return this.restart();
    await this.start();
  }
  async start() {
    await Promise.all(this.videos.map(ready));
    if (!this.playing) return;
    await Promise.all(this.videos.map((video) => video.play().catch(() => this.pause())));
    this.tick();
  }
  async restart() {
    this.videos.forEach((video) => { video.pause(); video.currentTime = 0; });
    await this.start();
  }
  pause() {
    this.playing = false;
    this.videos.forEach((video) => video.pause());
    this.seek(this.lead.currentTime);
  }
  tick() {
    if (!this.playing) return;
    const base = Number($("controls").elements.speed.value);
    this.lead.playbackRate = base;
    for (const video of this.videos.slice(1)) {
      const ahead = video.currentTime - this.lead.currentTime;
      if (Math.abs(ahead) > 2 / this.fps) video.currentTime = this.lead.currentTime;
      video.playbackRate = base * (Math.abs(ahead) < 0.2 / this.fps ? 1 : ahead > 0 ? 0.9 : 1.1);
    }
    this.show();
    requestAnimationFrame(() => this.tick());
  }
  seek(time) {
    const at = Math.min(Math.max(time, 0), Math.max(0, this.duration - 0.5 / this.fps));
    this.videos.forEach((video) => { video.currentTime = at; });
    this.show(at);
  }
  frame(by) {
    this.pause();
    this.seek((Math.round(this.lead.currentTime * this.fps - 0.5) + by + 0.5) / this.fps);
  }
}

const ready = (video) => new Promise((resolve) => {
  if (video.readyState >= 3 && !video.seeking) return resolve();
  const done = () => { if (video.readyState >= 3 && !video.seeking) { events.forEach((name) => video.removeEventListener(name, done)); resolve(); } };
  const events = ["canplay", "seeked", "error"];
  events.forEach((name) => video.addEventListener(name, name === "error" ? resolve : done));
});

function screen(label, path, truth) {
  const frame = element("div", { class: truth ? "frame compared" : "frame" });
  const videos = [];
  const add = (source, kind) => {
    const video = element("video", { preload: "none", muted: "", playsinline: "", class: kind, tabindex: "-1", "data-source": source });
    video.muted = true;
    video.addEventListener("loadedmetadata", () => { if (video.videoWidth) frame.style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`; });
    frame.append(video);
    videos.push(video);
  };
  if (path) add(path, "");
  else frame.append(element("p", { class: "missing" }, "no video was kept"));
  if (path && truth) add(truth, "over");
  return { node: element("figure", { class: "screen" }, element("figcaption", { title: label }, label), frame), videos };
}

function sparkline(curves, frames, first) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${frames} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  const all = curves.flatMap(([values]) => values);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  for (const [values, ink, width] of curves) {
    const line = document.createElementNS(svg.namespaceURI, "path");
    line.setAttribute("d", values.map((v, k) => `${k ? "L" : "M"}${first - 0.5 + k},${95 - (90 * (v - low)) / (high - low || 1)}`).join(""));
    for (const [name, value] of Object.entries({ fill: "none", stroke: ink, "stroke-width": width, "vector-effect": "non-scaling-stroke", "stroke-linejoin": "round" })) line.setAttribute(name, value);
    svg.append(line);
  }
  return svg;
}

function card(k, label) {
  const { digits, unit, better } = SCORE[state.score];
  const gain = gainsOf(label)[k];
  const truth = D.clips.truth[k];
  const screens = [screen(D.baseline, D.clips.videos[D.baseline][k], truth), screen(label, D.clips.videos[label][k], truth), screen("truth", truth, null)];
  const videos = screens.flatMap((one) => one.videos);
  const button = element("button", { type: "button", "aria-label": "Play" }, "▶");
  const output = element("output");
  const cursor = element("div", { class: "cursor" });
  const range = element("input", { type: "range", min: 0, max: 1, step: "any", value: 0, "aria-label": "Frame" });
  const own = D.clips.psnrFrames;
  const curves = [[D.baseline, 1.5], [label, 2]].filter(([name]) => own[name][k]).map(([name, width]) => [own[name][k], colour(name), width]);
  const frames = D.frames.first - 1 + (curves[0]?.[0].length ?? 1);
  const known = element("div", { class: "known", title: "given frames" });
  known.style.width = `${(100 * (D.frames.first - 1)) / frames}%`;
  const track = element("div", { class: "track", title: "PSNR over frames; grey: the baseline" }, known, sparkline(curves, frames, D.frames.first), range, cursor);
  const made = element("article", { class: "card", tabindex: 0, "data-clip": D.clips.id[k], "aria-label": D.clips.id[k] },
    element("header", {}, element("span", { class: "name" }, D.clips.id[k]),
      gain === null || gain === undefined ? "" : element("span", { class: `gain ${gain * better > 0 ? "better" : gain ? "worse" : ""}` }, `${signed(gain, digits)}${unit ? ` ${unit}` : ""}`)),
    element("p", { class: "caption", title: D.clips.caption[k] }, [D.clips.category[k], D.clips.caption[k]].filter(Boolean).join(" · ")),
    element("div", { class: "screens" }, ...screens.map((one) => one.node)),
    element("div", { class: "transport" }, button, track, output));
  if (!videos.length) { button.disabled = range.disabled = true; return made; }
  const step = new Step(videos, D.fps, (at = step.lead.currentTime) => {
    const share = step.duration ? at / step.duration : 0;
    cursor.style.left = `${100 * share}%`;
    range.value = share;
    button.textContent = step.playing ? "❚❚" : "▶";
    button.setAttribute("aria-label", step.playing ? "Pause" : "Play");
    const frame = Math.min(frames, Math.floor(at * D.fps + 1e-6) + 1);
    output.textContent = `${frame < D.frames.first ? "given" : "continued"} ${frame}/${frames}`;
  });
  button.addEventListener("click", () => (step.playing ? step.pause() : step.play()));
  range.addEventListener("input", () => { const at = range.value * step.duration; step.pause(); step.seek(at); });
  made.addEventListener("keydown", (event) => {
    if (event.target.closest("button, summary") && event.key === " ") return;
    const act = { " ": () => (step.playing ? step.pause() : step.play()), ArrowRight: () => step.frame(1), ArrowLeft: () => step.frame(-1), Enter: () => event.target === made && made.classList.toggle("large"), d: () => $("controls").elements.difference.click() }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  made.addEventListener("click", (event) => { if (event.target.tagName === "VIDEO") made.classList.toggle("large"); });
  made.load = () => videos.forEach((video) => { if (!video.src) { video.preload = "auto"; video.src = video.dataset.source; } });
  made.unload = () => { step.pause(); videos.forEach((video) => { video.removeAttribute("src"); video.load(); }); };
  made.step = step;
  step.show(0);
  return made;
}

if ($("controls")) {
  const form = $("controls").elements;
  const withVideos = methods.filter(({ label }) => D.clips.videos[label].some(Boolean));
  options(form.arm, withVideos.map(({ label }) => [label, label]), withVideos.some(({ label }) => label === D.focus) ? D.focus : withVideos[0]?.label);
  const categories = [...new Set(D.clips.category)].filter(Boolean).sort();
  options(form.category, [["", "all"], ...categories.map((name) => [name, name])], "");
  if (!categories.length) form.category.parentElement.hidden = true;
  let shown = PAGE;
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (target.load) isIntersecting ? target.load() : target.unload();
  }, { rootMargin: "300px" });

  const fill = () => {
    const gains = gainsOf(form.arm.value);
    const { better } = SCORE[state.score];
    const text = form.text.value.trim().toLowerCase();
    const wanted = D.clips.id.map((_, k) => k).filter((k) => (gains[k] ?? null) !== null &&
      (!form.category.value || D.clips.category[k] === form.category.value) &&
      (!form.sign.value || (gains[k] ?? 0) * better * form.sign.value > 0) &&
      (!text || `${D.clips.id[k]} ${D.clips.caption[k]}`.toLowerCase().includes(text)));
    if (form.sort.value !== "name") {
      const sign = better * (form.sort.value === "gain" ? -1 : 1);
      wanted.sort((a, b) => sign * (gains[a] - gains[b]) || a - b);
    }
    for (const old of $("cards").children) { near.unobserve(old); old.step?.pause(); }
    $("cards").replaceChildren(...wanted.slice(0, shown).map((k) => card(k, form.arm.value)));
    for (const made of $("cards").children) near.observe(made);
    $("count").textContent = `${wanted.length.toLocaleString("en")} of ${D.clips.id.length.toLocaleString("en")} clips${wanted.length > shown ? `, the first ${shown} shown` : ""}`;
    $("more").hidden = wanted.length <= shown;
  };
  const look = () => {
    $("cards").classList.toggle("difference", form.difference.checked);
    $("cards").style.setProperty("--amplify", form.amplify.value);
  };
  for (const name of ["arm", "sort", "category", "sign"]) form[name].addEventListener("change", () => { shown = PAGE; fill(); });
  form.text.addEventListener("input", () => { shown = PAGE; fill(); });
  for (const name of ["difference", "amplify"]) form[name].addEventListener("input", look);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", () => { shown += PAGE; fill(); });
  onChange(fill);
  fill();
  look();
}
changed();
document.documentElement.dataset.ready = performance.now().toFixed(0);
