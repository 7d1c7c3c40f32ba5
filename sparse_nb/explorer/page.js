"use strict";
const find = id => document.getElementById(id);
const data = JSON.parse(find("data").textContent), templates = JSON.parse(find("templates").textContent);
const text = number => data.texts[number];
const controls = [...document.querySelectorAll("select.where")];
const question = find("question"), slider = find("strength"), night = matchMedia("(prefers-color-scheme: dark)");
const inks = {
  light: {ink: "#1b2330", soft: "#7c8797", line: "#97a1b0", band: "rgba(86,96,111,0.14)", alarm: "#b2182b",
    ground: "#ffffff", veil: "rgba(255,255,255,0.75)"},
  dark: {ink: "#eef1f6", soft: "#8d98a9", line: "#76818f", band: "rgba(169,179,194,0.16)", alarm: "#ff8a80",
    ground: "#14181f", veil: "rgba(20,24,31,0.75)"},
};

// Choosing: each control leaves some curves for the next one, and only what is left can be chosen.

function fill(select, numbers) {
  select.replaceChildren(...numbers.map(number => new Option(text(number), number)));
}

function chosenCurve() {
  let left = data.curves;
  for (const [i, control] of controls.entries()) {
    const there = new Set(left.map(curve => curve.where[i]));
    for (const option of control.options) option.disabled = !there.has(+option.value);
    if (!there.has(+control.value)) control.value = [...there][0];
    left = left.filter(curve => curve.where[i] === +control.value);
  }
  return left[0];
}

function chooseCurve() {
  const curve = chosenCurve(), before = question.value, names = curve.questions.map(([, name]) => name);
  fill(question, names);
  if (names.includes(+before)) question.value = before;
  find("question-label").textContent = text(curve.words[0]);
  find("question-hint").textContent = text(curve.words[5]);
  question.parentElement.hidden = names.length < 2;
  chooseQuestion();
}

// Where the new question has the same strengths as the one before, the slider stays, to compare two networks.
function chooseQuestion() {
  const curve = chosenCurve(), [, , start, stops] = curve.questions[question.selectedIndex];
  const same = stops.join() === slider.dataset.stops;
  slider.max = stops.length - 1;
  if (!same) slider.value = start;
  slider.dataset.stops = stops.join();
  find("strength-label").textContent = text(curve.words[1]);
  find("strength-part").hidden = stops.length < 2;
  find("picked").hidden = true;
  plot();
}

const chosenView = () => ({curve: chosenCurve(), question: question.selectedIndex, stop: +slider.value});

// The address says what is shown, in the words of the menus, so that a view can be sent. What it says is only ever
// compared with words that the page has; what is unknown falls back to the first that there is.

const slug = words => words.toLowerCase().replace(/[^a-z0-9.]+/g, "-").replace(/^-|-$/g, "");
const parts = [...controls.map(control => control.id), "question", "strength"];

function slugsOf({curve, question, stop}) {
  const [, name, , stops] = curve.questions[question];
  return [...curve.where, name, stops[stop]].map(number => slug(text(number)));
}

// The view that some slugs name, and whether they name all of it.
function viewOf(slugs) {
  const known = (numbers, i) => numbers.findIndex(number => slug(text(number)) === slugs[i]);
  let left = data.curves, found = [];
  for (const i of controls.keys()) {
    found.push(known(left.map(curve => curve.where[i]), i));
    const chosen = left[Math.max(found[i], 0)].where[i];
    left = left.filter(curve => curve.where[i] === chosen);
  }
  const [curve] = left;
  found.push(known(curve.questions.map(([, name]) => name), controls.length));
  const asked = Math.max(found.at(-1), 0), [, , start, stops] = curve.questions[asked];
  found.push(known(stops, controls.length + 1));
  const stop = found.at(-1) < 0 ? start : found.at(-1);
  return {view: {curve, question: asked, stop}, complete: found.every(place => place >= 0)};
}

function address() {
  const slugs = slugsOf(chosenView()), state = new URLSearchParams(parts.map((name, i) => [name, slugs[i]]));
  if (pinned) state.set("with", slugsOf(pinned).join("/"));
  return "#" + state;
}

let pinned = null, writing = 0;

// Browsers refuse an address that changes a hundred times in a second, as it would with the slider.
function changed() {
  clearTimeout(writing);
  writing = setTimeout(() => history.replaceState(null, "", address()), 200);
}

function restore() {
  clearTimeout(writing);
  const state = new URLSearchParams(location.hash.slice(1));
  const {view} = viewOf(parts.map(name => state.get(name)));
  const other = viewOf((state.get("with") ?? "").split("/"));
  pinned = other.complete ? other.view : null;
  for (const [i, control] of controls.entries()) control.value = view.curve.where[i];
  chooseCurve();
  question.selectedIndex = view.question;
  chooseQuestion();
  slider.value = view.stop;
  plot();
}

// Points and their words. Accuracies come as hundredths of a percent, null where there is none.

const percent = hundredths => hundredths === null ? "–" : (hundredths / 100).toFixed(1) + "\u00a0%";
const weights = density => +(100 * density).toPrecision(3) + "\u00a0%";
const isPair = p => p.seeds === 2 && p.low !== null, hasBar = p => p.seeds > 2 && p.low !== null;
const interval = p => p.low === null ? "no interval" : (isPair(p) ? "two seeds: " : "") + (p.low / 100).toFixed(1)
  + (isPair(p) ? " and " : " to ") + (p.high / 100).toFixed(1);
const shape = p => p.depth + (p.repeat > 1 ? " × " + p.repeat : "");

// The one place where text from the data becomes markup: plotly reads tags. All other text is set as textContent.
const escaped = words => String(words).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);

function pointsOf({curve, question, stop}, axis) {
  const [, , , , means, lows, highs] = curve.questions[question];
  return curve.places.map((number, i) => {
    const [width, depth, repeat, density, colour, ended, networks, converged, diverged, runs] = data.places[number];
    return {
      x: axis.type === "log" ? 100 * density : i, mean: means[stop][i], low: lows[stop][i], high: highs[stop][i],
      clean: curve.clean[i], seeds: curve.seeds[i], width, depth, repeat, density, networks, converged, diverged,
      colour: text(colour), ended: text(ended), runs: runs.map(run => data.runs[run]),
    };
  });
}

function linesOf(p) {
  return [
    `${percent(p.mean)} (${interval(p)})` + (isPair(p) ? "" : `, ${p.seeds} seed${p.seeds === 1 ? "" : "s"}`),
    `remaining weights ${weights(p.density)}`,
    `width ${p.width}, depth ${shape(p)}`,
    `networks: ${p.ended}`,
  ];
}

const hover = (p, more = []) => [...more, ...linesOf(p)].map(escaped).join("<br>");

// The hashes of the runs stay in sight when a point is clicked, so that they can be copied.
function pick({points: [{data: {name}, pointNumber}]}) {
  const of = name === "compared" ? pinned : chosenView(), p = pointsOf(of, axisOf(of, pinned))[pointNumber];
  find("picked").textContent = `${titleOf(of)}. ${linesOf(p).join("; ")}; runs ${p.runs.join(" ")}`;
  find("picked").hidden = false;
}

function strengthOf({curve, question, stop}) {
  const [, , , stops] = curve.questions[question];
  return stops.length > 1 ? text(curve.words[3]) + text(stops[stop]) : "";
}

function titleOf(view) {
  const {curve, question} = view, titles = curve.where.map(text), strength = strengthOf(view);
  const which = curve.questions.length > 1 ? ", " + text(curve.questions[question][1]) : "";
  return `${titles[1]} on ${titles[0]}, growing in ${titles[2]}: ${text(curve.words[2])}${which}`
    + (strength ? ", " + strength : "");
}

function pinnedWords() {
  const [schedule, rule] = pinned.curve.where.slice(3, 5).map(text);
  return `${titleOf(pinned)}; weights removed ${schedule}, allocation rule: ${rule}${studyWords(pinned.curve)}`;
}

// Which study a curve is of, where the page has several: the last menu.
const studyOf = curve => curve.where.length > 6 ? text(curve.where[6]) : "";
const studyWords = curve => studyOf(curve) && `; study ${studyOf(curve)}`;

// The two ends of the curve, which nobody has picked. What the paper claims of it is judged over all strengths.
function summary(view, measured) {
  const base = measured.find(p => p.density === 1), last = measured[measured.length - 1], strength = strengthOf(view);
  if (!last) return "Nothing could be measured: all networks diverged.";
  const reach = p => percent(p.mean) + (p.low === null ? "" : ` (${interval(p)})`);
  const first = base ? `dense base ${reach(base)}` : "the dense base is not measured";
  const end = last === base ? "" : `; sparsest networks, ${weights(last.density)} of their weights, ${reach(last)}`;
  return (strength ? `At ${strength}: ${first}` : first[0].toUpperCase() + first.slice(1)) + end + ".";
}

// What the claim's test says of this panel: the verdict, then the sentence, both made with the page.
function tellClaim(curve) {
  const [verdict, sentence] = curve.claim.map(text);
  const word = Object.assign(document.createElement("b"), {textContent: verdict});
  find("claim").replaceChildren(...verdict ? [word, " "] : [], sentence);
}

function row(p) {
  const cells = [weights(p.density), p.width, shape(p), percent(p.mean), interval(p), percent(p.clean), p.seeds,
    p.ended, p.runs.join(" ")];
  const line = document.createElement("tr");
  line.append(...cells.map(words => Object.assign(document.createElement("td"), {textContent: words})));
  return line;
}

// Plotting.

// The 95 % intervals as a band, in pieces where a place has none.
function band(points) {
  const x = [], y = [];
  let piece = [];
  for (const p of [...points, null]) {
    if (p && p.mean !== null && hasBar(p)) piece.push(p);
    else if (piece.length) {
      const back = [...piece].reverse();
      x.push(...piece.map(q => q.x), ...back.map(q => q.x), null);
      y.push(...piece.map(q => q.high / 100), ...back.map(q => q.low / 100), null);
      piece = [];
    }
  }
  return {x, y, mode: "lines", line: {width: 0}, fill: "toself", hoverinfo: "skip"};
}

// The vertical axis holds all strengths of the question: the curve moves with the slider, the axis does not.
function bounds(curve, ...values) {
  const all = [...values.flat(2), ...curve.clean].filter(mean => mean !== null).map(mean => mean / 100);
  if (!all.length) return [0, 100];
  const low = Math.min(...all), high = Math.max(...all), room = Math.max(0.08 * (high - low), (10 - (high - low)) / 2);
  return [Math.max(low - room, -4), Math.min(high + room, 104)];
}

// Two curves share the axis of the one that is there, or, where theirs differ, one of densities.
function axisOf(view, other) {
  if (!other || other.curve.axis === view.curve.axis) return data.axes[view.curve.axis];
  const densities = [view, other].flatMap(({curve}) => curve.places.map(number => 100 * data.places[number][3]));
  const lowest = Math.min(...densities), ticks = [];
  for (let tick = 100; tick > lowest / 1.1; tick /= 2) ticks.push(tick);
  return {type: "log", range: [2.06, Math.log10(lowest) - 0.06], tickvals: ticks,
    ticktext: ticks.map(tick => String(+tick.toPrecision(tick >= 2 ? 4 : tick >= 1 ? 3 : 2))),
    title: "remaining weights (%)"};
}

function comparedTrace(points, words, ink) {
  const reach = side => points.map(p => hasBar(p) && p.mean !== null ? Math.abs(p[side] - p.mean) / 100 : 0);
  return {x: points.map(p => p.x), y: points.map(p => p.mean === null ? null : p.mean / 100), name: "compared",
    mode: "lines+markers", line: {color: ink.soft, width: 2, dash: "dash"}, cliponaxis: false,
    error_y: {symmetric: false, array: reach("high"), arrayminus: reach("low"), color: ink.soft, thickness: 1.2,
      width: 3},
    text: points.map(p => hover(p, [words])), hovertemplate: "%{text}<extra></extra>",
    marker: {size: 10, symbol: "diamond-open", color: ink.soft, line: {width: 2}}};
}

function bar(p) {
  return {
    x: [p.x], y: [p.mean === null ? null : p.mean / 100], name: "bar", mode: "markers", hoverinfo: "skip",
    marker: {size: 1, color: p.colour},
    error_y: {symmetric: false, array: [hasBar(p) ? (p.high - p.mean) / 100 : 0],
      arrayminus: [hasBar(p) ? (p.mean - p.low) / 100 : 0], visible: hasBar(p), color: p.colour, thickness: 1.5,
      width: 4},
  };
}

// Two seeds say more than an interval of two numbers.
function pairsOf(points, colourOf) {
  const pairs = points.filter(isPair), twice = of => pairs.flatMap(p => [of(p), of(p)]);
  return {x: twice(p => p.x), y: pairs.flatMap(p => [p.low / 100, p.high / 100]), name: "seeds", mode: "markers",
    hoverinfo: "skip", cliponaxis: false, marker: {size: 5, color: twice(colourOf)}};
}

function traces(points, base, best, bottom, ink, compared) {
  const percents = name => points.map(p => p[name] === null ? null : p[name] / 100);
  const x = points.map(p => p.x), colours = points.map(p => p.colour);
  const ringed = points.filter(p => p === base || p === best), fallen = points.filter(p => p.diverged);
  return [
    {...band(points), name: "interval", fillcolor: ink.band},
    {x, y: percents("clean"), name: "clean", mode: "lines", line: {color: ink.soft, width: 2, dash: "dot"},
      hoverinfo: "skip"},
    {x, y: percents("mean"), name: "mean", mode: "lines", line: {color: ink.line, width: 2}, hoverinfo: "skip"},
    ...compared,
    ...points.map(bar),
    {x: ringed.map(p => p.x), y: ringed.map(p => p.mean / 100), name: "marked", mode: "markers", hoverinfo: "skip",
      cliponaxis: false, marker: {symbol: "circle-open", size: 21, color: ink.ink, line: {width: 1.5}}},
    {x, y: percents("mean"), name: "points", mode: "markers", text: points.map(p => hover(p)),
      hovertemplate: "%{text}<extra></extra>", cliponaxis: false,
      marker: {size: 11, color: colours, symbol: points.map(p => p.converged === p.networks ? "circle" : "circle-open"),
        line: {color: colours, width: 2.5}}},
    pairsOf(points, p => p.colour),
    {x: fallen.map(p => p.x), y: fallen.map(() => bottom), name: "diverged", mode: "markers+text",
      text: fallen.map(p => `${p.diverged} of ${p.networks} diverged`), textposition: "top center",
      textfont: {color: ink.alarm, size: 11}, marker: {symbol: "x", size: 10, color: ink.alarm}, cliponaxis: false,
      hoverinfo: "skip"},
  ].map(trace => ({...trace, type: "scatter", showlegend: false}));
}

function annotation(p, words, points, axis, ink) {
  const side = p === points[0] ? {xanchor: "left", xshift: -6}
    : p === points[points.length - 1] ? {xanchor: "right", xshift: 12} : {};
  return {x: axis.type === "log" ? Math.log10(p.x) : p.x, y: p.mean / 100, text: words, showarrow: false, yshift: 22,
    ...side, borderpad: 1, bgcolor: ink.veil, font: {size: 12, color: ink.ink}};
}

// Labels stand straight and apart: where a tick has less room than the longest label needs, every second or third has
// one. width: of the plot, in pixels.
function straightened(axis, width) {
  const places = axis.tickvals.map(value => axis.type === "log" ? Math.log10(value) : value);
  const room = width * Math.abs((places[1] - places[0]) / (axis.range[1] - axis.range[0])) || Infinity;
  const longest = Math.max(...axis.ticktext.flatMap(words => words.split("<br>")).map(line => line.length));
  const every = Math.ceil((7 * longest + 8) / room);
  return {...axis, tickangle: 0, ticktext: axis.ticktext.map((words, i) => i % every ? "" : words)};
}

const margin = {l: 58, r: 18, t: 22, b: 58};

function layoutOf(points, base, best, axis, range, value, width) {
  const scheme = night.matches ? "dark" : "light", ink = inks[scheme];
  const labels = base && base === best ? [[base, "base and best"]]
    : [[base, "base"], [best, "best"]].filter(([p]) => p);
  return {
    template: templates[scheme], margin, dragmode: false, hovermode: "closest",
    hoverlabel: {align: "left", bgcolor: ink.ground, bordercolor: ink.soft, font: {color: ink.ink}},
    xaxis: {...straightened(axis, width - margin.l - margin.r), title: {text: axis.title}, fixedrange: true,
      zeroline: false},
    yaxis: {range, title: {text: escaped(text(value)) + " (%)"}, fixedrange: true, zeroline: false},
    annotations: labels.map(([p, words]) => annotation(p, words, points, axis, ink)),
  };
}

// The key lists what occurs.
function tellKey(points) {
  const there = {
    closed: points.some(p => p.mean !== null && p.converged === p.networks),
    open: points.some(p => p.mean !== null && p.converged !== p.networks),
    interval: points.some(hasBar),
    pairs: points.some(isPair),
    clean: points.some(p => p.clean !== null),
    compared: pinned,
    diverged: points.some(p => p.diverged),
  };
  for (const [name, occurs] of Object.entries(there)) find("key-" + name).hidden = !occurs;
}

function figureOf(view, width = find("chart").clientWidth) {
  const {curve, question: asked} = view, [value, , , , means, lows, highs] = curve.questions[asked];
  const axis = axisOf(view, pinned), points = pointsOf(view, axis), ink = inks[night.matches ? "dark" : "light"];
  const measured = points.filter(p => p.mean !== null), base = measured.find(p => p.density === 1);
  const best = measured.reduce((a, b) => a && a.mean >= b.mean ? a : b, null);
  const others = pinned ? pointsOf(pinned, axis) : [], ends = others.map(p => [p.mean, p.low, p.high]);
  const range = bounds(curve, means, lows, highs, ends);
  const compared = pinned ? [comparedTrace(others, titleOf(pinned), ink),
    {...pairsOf(others, () => ink.soft), name: "compared seeds"}] : [];
  return {points, measured, data: traces(points, base, best, range[0], ink, compared),
    layout: layoutOf(points, base, best, axis, range, value, width)};
}

function plot() {
  const view = chosenView(), {curve} = view, [, , , stops] = curve.questions[view.question];
  const figure = figureOf(view), {points} = figure;
  find("title").textContent = titleOf(view);
  find("method").textContent = `${text(curve.words[4])}; allocation rule: ${text(curve.where[4])}${studyWords(curve)}.`;
  find("summary").textContent = summary(view, figure.measured);
  find("compare").textContent = pinned ? "Stop comparing" : "Compare with …";
  find("compare").setAttribute("aria-pressed", String(pinned !== null));
  find("compared").hidden = !pinned;
  find("compared").textContent = pinned && `Compared with (diamonds): ${pinnedWords()}. `
    + "Choose the other curve in the menus.";
  find("value").textContent = text(stops[view.stop]);
  slider.setAttribute("aria-valuetext", text(stops[view.stop]));
  find("rows").replaceChildren(...points.map(row));
  tellClaim(curve);
  tellKey(points);
  return Plotly.react("chart", figure.data, figure.layout, {responsive: true, displayModeBar: false});
}

// Listening: each control plots when it changes, the slider while it moves, the page when day turns to night.

// Lines of at most so many signs, for plotly, which does not wrap.
function wrapped(words, most) {
  const lines = [""];
  for (const word of words.split(" ")) {
    if (lines.at(-1).length + word.length >= most) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) && " ") + word;
  }
  return lines.map(escaped).join("<br>");
}

// A saved plot goes without the page: it carries its title and where its numbers come from.
function save() {
  const view = chosenView(), {data: drawn, layout} = figureOf(view, 800), title = titleOf(view);
  const method = find("method").textContent + (pinned ? ` Diamonds: ${pinnedWords()}.` : "");
  const made = [...document.querySelectorAll("footer p")].map(line => line.textContent);
  const source = `sparse-nb. ${made.find(line => line.startsWith(studyOf(view.curve) + ": ")) ?? made.at(-1) ?? ""}`;
  const note = (words, y, more) => ({text: words, xref: "paper", yref: "paper", x: 0, y, xanchor: "left", align: "left",
    showarrow: false, font: {size: 11}, ...more});
  const annotations = [...layout.annotations, note(wrapped(method, 130), 1, {yanchor: "bottom", yshift: 12}),
    note(wrapped(source, 130), 0, {yanchor: "top", yshift: -55, font: {size: 9}})];
  const figure = {data: drawn, layout: {...layout, annotations, margin: {...margin, t: 95, b: 120},
    title: {text: wrapped(title, 85), x: 0.02, y: 0.97, yanchor: "top", font: {size: 15}}}};
  const filename = title.replace(/[^A-Za-z0-9.-]+/g, "_");
  Plotly.downloadImage(figure, {format: "svg", width: 800, height: 560, filename});
}

function compare() {
  pinned = pinned ? null : chosenView();
  plot();
  changed();
}

// Where the clipboard is refused, the link can be copied by hand.
async function copyLink() {
  const field = find("address"), button = find("link"), words = button.textContent;
  field.value = location.href.split("#")[0] + address();
  try {
    await navigator.clipboard.writeText(field.value);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = words; }, 2000);
  } catch {
    field.hidden = false;
    field.select();
  }
}

for (const [i, control] of controls.entries()) {
  fill(control, [...new Set(data.curves.map(curve => curve.where[i]))]);
  control.addEventListener("change", chooseCurve);
}
question.addEventListener("change", chooseQuestion);
slider.addEventListener("input", plot);
for (const control of [...controls, question, slider]) control.addEventListener("input", changed);
night.addEventListener("change", plot);
addEventListener("resize", plot);
addEventListener("hashchange", restore);
find("save").addEventListener("click", save);
find("compare").addEventListener("click", compare);
find("link").addEventListener("click", copyLink);
find("controls").addEventListener("submit", event => event.preventDefault());
find("menus").open = !matchMedia("(max-width: 48rem)").matches;
restore();
find("chart").on("plotly_click", pick);
