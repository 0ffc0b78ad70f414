// The sentinel's page: asks for the status each second and draws it. All texts
// may come from an attacker, so they go into text nodes and attributes, never
// into markup.
"use strict";

const every = 1000; // milliseconds
const byId = id => document.getElementById(id);

// node makes an element: its attributes, then its children, strings as text.
function node(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "title"].includes(name);
  const n = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) n.setAttribute(k, v);
  n.append(...children.filter(c => c !== null && c !== undefined));
  return n;
}

const percent = v => v === undefined || v === null ? "–" : (100 * v).toFixed(1) + "%";
const clock = t => new Date(t).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const moment = t => new Date(t).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" });
const short = d => (d || "").slice(0, 19);
const whole = n => n.toLocaleString("en");
const when = t => node("time", { datetime: t }, clock(t));

// replace changes the children only where something changed, so that focus and
// what is read aloud stay.
const shown = new Map();
function replace(parent, data, make) {
  const key = JSON.stringify(data);
  if (shown.get(parent.id) === key) return;
  shown.set(parent.id, key);
  parent.replaceChildren(...make());
}

// chart draws lines over x; y runs from 0 to top.
function chart(parent, label, lines, options) {
  const w = Math.min(Math.max(parent.clientWidth || 520, 280), 560), h = 200, left = 40, right = 12, above = 12, below = 24;
  const points = lines.flatMap(l => l.points);
  const svg = node("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": label });
  const xs = points.map(p => p[0]);
  const from = options.from ?? Math.min(...xs), to = options.to ?? Math.max(...xs, from + 1e-9);
  const top = options.top ?? Math.max(1, ...points.map(p => p[1])) * 1.1;
  const x = v => left + (v - from) / (to - from) * (w - left - right);
  const y = v => h - below - Math.min(Math.max(v, 0), top) / top * (h - above - below);
  for (const v of options.ticks ?? [0, top / 2, top]) {
    svg.append(node("line", { class: "grid", x1: left, x2: w - right, y1: y(v), y2: y(v) }),
      node("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, options.format(v)));
  }
  for (const [v, text] of options.xTicks ?? []) {
    const anchor = v <= from ? "start" : v >= to ? "end" : "middle";
    svg.append(node("text", { x: x(v), y: h - 6, "text-anchor": anchor }, text));
  }
  for (const m of options.marks ?? []) {
    if (m >= from && m <= to) svg.append(node("line", { class: "mark", x1: x(m), x2: x(m), y1: above, y2: h - below }));
  }
  for (const l of lines) {
    const usable = l.points.filter(p => Number.isFinite(p[1]));
    if (usable.length === 0) continue;
    const path = usable.map((p, i) => (i ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("");
    if (l.area) svg.append(node("path", { class: "area", d: path + `L${x(usable.at(-1)[0])} ${y(0)}L${x(usable[0][0])} ${y(0)}Z` }));
    svg.append(node("path", { class: "line " + (l.kind ?? ""), d: path }));
    if (l.dots) for (const p of usable) svg.append(node("circle", { class: "dot " + (l.kind ?? ""), cx: x(p[0]), cy: y(p[1]), r: 3 }));
  }
  if (options.limit !== undefined) {
    svg.append(node("line", { class: "limit", x1: left, x2: w - right, y1: y(options.limit), y2: y(options.limit) }),
      node("text", { class: "limit-text", x: left + 4, y: y(options.limit) - 5 }, "threshold"));
  }
  const legend = node("ul", { class: "legend" });
  if (lines.length > 1) for (const l of lines) legend.append(node("li", { class: l.kind ?? "" }, l.name));
  parent.replaceChildren(svg, ...(lines.length > 1 ? [legend] : []));
}

const nothing = text => node("p", { class: "empty" }, text);

function drawTiles(s, rate) {
  const used = s.attack.limit ? s.attack.level / s.attack.limit : 0;
  const tiles = [
    ["Live accuracy", percent(s.live_accuracy), s.labels ? `by the last of ${whole(s.labels)} labels` : "no labels yet", ""],
    ["Guard agrees", percent(s.agreement), "with the last answers", s.agreement !== undefined && s.agreement < .8 ? "warn" : ""],
    ["Alarm level", s.attack.level.toFixed(1), `attack at ${s.attack.limit.toFixed(0)}; drift ${s.drift.level.toFixed(1)}`, used >= 1 ? "bad" : used >= .5 ? "warn" : ""],
    ["Requests", rate === null ? "–" : rate.toFixed(rate < 10 ? 1 : 0) + "/s", `${whole(s.requests)} to this model`, ""],
    ["Flagged", s.requests ? percent(s.flagged / s.requests) : "–", `${whole(s.flagged)} hostile, ${whole(s.shifted)} unusual`, s.state === "alarm" || s.state === "defending" ? "bad" : ""],
    ["Defences", `${s.defences_today} of ${s.defences_allowed}`, s.circuit ? "a person must approve" : "in 24 hours", s.circuit ? "warn" : ""],
  ];
  byId("tiles").replaceChildren(...tiles.map(([name, value, note, tone]) =>
    node("div", { class: tone }, node("dt", {}, name), node("dd", {}, value), node("dd", { class: "small" }, note))));
}

function drawHistory(s) {
  const h = s.history.map(m => ({ ...m, t: new Date(m.at).getTime() }));
  const ids = ["chart-alarm", "chart-live", "chart-rate"];
  if (h.length < 2) {
    for (const id of ids) byId(id).replaceChildren(nothing("Waiting for requests."));
    return;
  }
  const ends = [[h[0].t, clock(h[0].at)], [h.at(-1).t, clock(h.at(-1).at)]];
  const marks = [...s.incidents, ...(s.open ? [s.open] : [])].map(i => new Date(i.opened).getTime());
  const last = h.at(-1);
  const top = Math.max(2 * s.attack.limit, ...h.map(m => m.attack)) || 1;
  chart(byId("chart-alarm"), `Alarm level: now ${last.attack.toFixed(1)}, threshold ${s.attack.limit.toFixed(0)}; drift ${last.drift.toFixed(1)}`, [
    { name: "attack", points: h.map(m => [m.t, m.attack]) },
    { name: "drift", kind: "amber", points: h.map(m => [m.t, m.drift]) },
  ], { top, limit: s.attack.limit, ticks: [0, s.attack.limit, top], format: v => v.toFixed(0), xTicks: ends, marks });
  chart(byId("chart-live"), `Live accuracy: now ${percent(last.live_accuracy)}; the guard agrees with ${percent(last.agreement)}`, [
    { name: "accuracy by labels", points: h.map(m => [m.t, m.live_accuracy ?? NaN]) },
    { name: "agreement of the guard", kind: "dashed", points: h.map(m => [m.t, m.agreement ?? NaN]) },
  ], { top: 1, ticks: [0, .5, 1], format: v => 100 * v + "%", xTicks: ends, marks });
  const rates = key => h.slice(1).map((m, i) => [m.t, Math.max(0, m[key] - h[i][key]) / Math.max(.001, (m.t - h[i].t) / 1000)]);
  const all = rates("requests"), bad = rates("flagged");
  chart(byId("chart-rate"), `Requests: now ${all.at(-1)[1].toFixed(1)} per second, of them flagged ${bad.at(-1)[1].toFixed(1)}`, [
    { name: "requests per second", area: true, points: all },
    { name: "flagged", kind: "red", points: bad },
  ], { format: v => v < 10 ? v.toFixed(1) : v.toFixed(0), xTicks: ends, marks });
}

function drawCurve(s) {
  const place = byId("chart-curve");
  const key = JSON.stringify([s.versions, place.clientWidth]);
  if (shown.get(place.id) === key) return;
  shown.set(place.id, key);
  const lines = s.versions.slice(-2).filter(v => v.curve && v.curve.length).map((v, i, all) => ({
    name: v.version, dots: true, kind: i < all.length - 1 ? "dashed" : "", points: v.curve.map(p => [p.epsilon, p.accuracy]),
  }));
  if (lines.length === 0) {
    place.replaceChildren(nothing("No signed report with a curve."));
    return;
  }
  const to = Math.max(...lines.flatMap(l => l.points.map(p => p[0])));
  const epsilon = s.versions.at(-1).epsilon;
  chart(place, "Accuracy by epsilon: " + lines.map(l => `${l.name} ${l.points.map(p => `${percent(p[1])} at ${p[0]}`).join(", ")}`).join("; "),
    lines, { from: 0, to, top: 1, ticks: [0, .5, 1], format: v => 100 * v + "%", xTicks: [[0, "0"], [to, `epsilon ${to}`]], marks: epsilon ? [epsilon] : [] });
}

function drawFlagged(list, classes) {
  const name = c => classes && classes[c] !== undefined ? classes[c] : String(c);
  replace(byId("flagged"), [list, classes], () => list.length === 0 ? [node("li", { class: "empty" }, "Nothing was flagged.")] : list.map(f => {
    const image = (form, alt) => node("img", { src: `evidence/${f.request}/${form}.png`, alt: `${alt} of request ${f.request}`, loading: "lazy" });
    const row = (what, value, tone = "") => node("p", { class: tone }, node("span", {}, what), node("span", {}, value));
    return node("li", {},
      node("div", { class: "pair" }, image("original", "Input"), image("squeezed", "Squeezed input")),
      row("model", name(f.served)), row("guard", name(f.guard), f.served !== f.guard ? "differs" : ""), row("score", f.score.toFixed(2)));
  }));
}

const tones = { "attack began": "red", alarm: "red", failed: "red", rejected: "red", "gate failed": "red", "rolled-back": "red", "no defence": "red", recovered: "green", promoted: "green", "gate passed": "green" };

function drawIncidents(s) {
  const all = [...(s.open ? [s.open] : []), ...s.incidents.slice().reverse()];
  replace(byId("incidents"), all, () => {
    if (all.length === 0) return [nothing("None so far.")];
    const open = new Set([...byId("incidents").querySelectorAll("details[open]")].map(d => d.id));
    return all.map((i, n) => {
      const outcome = i.outcome || "open";
      const facts = [`model ${i.model}`, `at request ${whole(i.request)}`];
      if (i.share) facts.push(`about ${(100 * i.share).toFixed(0)}% of the traffic`);
      if (i.epsilon) facts.push(`epsilon about ${i.epsilon}`);
      if (i.held) facts.push(i.held);
      if (i.error) facts.push(i.error);
      const d = node("details", { id: "incident-" + i.id },
        node("summary", {}, node("b", {}, i.cause), node("span", { class: "chip " + (i.outcome || "alarm") }, outcome), node("time", { datetime: i.opened }, moment(i.opened))),
        node("p", { class: "facts" }, facts.join(" · ")),
        i.evidence ? node("p", { class: "facts" }, "evidence ", node("code", {}, i.evidence)) : null,
        node("ol", { class: "timeline" }, ...(i.timeline || []).map(e =>
          node("li", { class: tones[e.name] || "" }, when(e.at), node("b", {}, e.name), e.text || ""))));
      d.open = open.has(d.id) || n === 0 && !shown.get("opened-" + i.id);
      shown.set("opened-" + i.id, true);
      return d;
    });
  });
}

function drawVersions(s) {
  replace(byId("versions"), s.versions, () => s.versions.slice().reverse().map((v, n) => node("tr", {},
    node("td", {}, n === 0 ? node("b", {}, v.version) : v.version),
    node("td", {}, moment(v.since)),
    node("td", {}, node("code", { title: v.digest }, short(v.digest))),
    node("td", { class: "wrap" }, v.signed_by && v.signed_by.length ? "verified: " + v.signed_by.join(", ") : "no signed report"),
    node("td", { class: "number" }, v.clean_accuracy ? percent(v.clean_accuracy) : "–"),
    node("td", { class: "number" }, v.robust_accuracy !== undefined && v.signed_by ? percent(v.robust_accuracy) + (v.epsilon ? ` at ${v.epsilon}` : "") : "–"))));
}

function say(id, text) {
  const n = byId(id);
  if (n.textContent !== text) n.textContent = text;
}

async function refresh() {
  try {
    const [status, evidence] = await Promise.all(["status", "evidence"].map(async path => {
      const r = await fetch(path, { cache: "no-store" });
      if (!r.ok) throw new Error(`${path}: ${r.status}`);
      return r.json();
    }));
    const h = status.history;
    const last = h.length > 1 ? [h.at(-2), h.at(-1)] : null;
    const rate = last ? Math.max(0, last[1].requests - last[0].requests) / Math.max(.001, (new Date(last[1].at) - new Date(last[0].at)) / 1000) : null;
    say("state", status.state);
    byId("state").className = "chip " + status.state;
    say("watching", status.model ? `watching ${status.model}` : "no model is in service");
    const problem = [status.problem, status.circuit && `A person must approve the next defence: ${status.circuit}.`].filter(Boolean).join(" ");
    byId("problem").hidden = !problem;
    say("problem", problem);
    drawTiles(status, rate);
    drawHistory(status);
    drawCurve(status);
    drawFlagged(evidence, status.classes);
    drawIncidents(status);
    drawVersions(status);
    say("updated", "Updated " + clock(new Date()));
  } catch (err) {
    say("state", "not reachable");
    byId("state").className = "chip";
    say("updated", String(err));
  }
  setTimeout(refresh, every);
}
refresh();
