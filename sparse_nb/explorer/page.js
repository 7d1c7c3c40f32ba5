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
  question.parentElement.hidden = names.length < 2;
  chooseQuestion();
}

// Where the new question has the same strengths as the one before, the slider stays, so that two networks can be compared.
function chooseQuestion() {
  const curve = chosenCurve(), [, , start, stops] = curve.questions[question.selectedIndex];
  const same = stops.join() === slider.dataset.stops;
  slider.max = stops.length - 1;
  if (!same) slider.value = start;
  slider.dataset.stops = stops.join();
  find("strength-label").textContent = text(curve.words[1]);
  find("strength-part").hidden = stops.length < 2;
  plot();
}

// Points and their words. Accuracies come as hundredths of a percent, null where there is none.

const percent = hundredths => hundredths === null ? "–" : (hundredths / 100).toFixed(1) + "\u00a0%";
const weights = density => +(100 * density).toPrecision(3) + "\u00a0%";
const interval = p => p.low === null ? "no interval"
  : `${(p.low / 100).toFixed(1)} to ${(p.high / 100).toFixed(1)}`;
const shape = p => p.depth + (p.repeat > 1 ? " × " + p.repeat : "");

// The one place where text from the data becomes markup: plotly reads tags. All other text is set as textContent.
const escaped = words => String(words).replace(/[&<>"']/g, sign => `&#${sign.charCodeAt(0)};`);

function pointsOf(curve, means, lows, highs) {
  return curve.places.map((number, i) => {
    const [width, depth, repeat, density, colour, ended, networks, converged, diverged, runs] = data.places[number];
    return {
      x: data.axes[curve.axis].type === "log" ? 100 * density : i, mean: means[i], low: lows[i], high: highs[i],
      clean: curve.clean[i], seeds: curve.seeds[i], width, depth, repeat, density, networks, converged, diverged,
      colour: text(colour), ended: text(ended), runs: runs.map(run => data.runs[run]),
    };
  });
}

function hover(p) {
  const lines = [
    `<b>${percent(p.mean)}</b> (${interval(p)}), ${p.seeds} seed${p.seeds === 1 ? "" : "s"}`,
    `remaining weights ${weights(p.density)}`,
    `width ${p.width}, depth ${shape(p)}`,
    `networks: ${escaped(p.ended)}`,
  ];
  for (let i = 0; i < p.runs.length; i += 2) {
    lines.push((i ? "" : "runs ") + p.runs.slice(i, i + 2).map(escaped).join(" "));
  }
  return lines.join("<br>");
}

// The best of several means is not by itself news: the sentence compares two intervals, and claims no more than that.
function summary(base, best) {
  if (!best) return "Nothing could be measured: all networks diverged.";
  const reach = p => `${percent(p.mean)}` + (p.low === null ? "" : ` (${interval(p)})`);
  const where = `The best mean, ${reach(best)}, is at ${weights(best.density)} of the weights`;
  if (!base) return `${where}. The dense base is not there.`;
  if (base === best) return `The dense base is best: ${reach(base)}.`;
  const apart = base.low === null || best.low === null ? "Without intervals from several seeds, that says little."
    : best.low > base.high ? "The intervals do not overlap." : "The intervals overlap.";
  return `${where}; the dense base has ${reach(base)}. ${apart}`;
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
    if (p && p.mean !== null && p.low !== null) piece.push(p);
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

function bar(p) {
  return {
    x: [p.x], y: [p.mean === null ? null : p.mean / 100], name: "bar", mode: "markers", hoverinfo: "skip",
    marker: {size: 1, color: p.colour},
    error_y: {symmetric: false, array: [p.low === null ? 0 : (p.high - p.mean) / 100],
      arrayminus: [p.low === null ? 0 : (p.mean - p.low) / 100], visible: p.low !== null, color: p.colour,
      thickness: 1.5, width: 4},
  };
}

function traces(points, base, best, bottom, ink) {
  const percents = name => points.map(p => p[name] === null ? null : p[name] / 100);
  const x = points.map(p => p.x), colours = points.map(p => p.colour);
  const ringed = points.filter(p => p === base || p === best), fallen = points.filter(p => p.diverged);
  return [
    {...band(points), name: "interval", fillcolor: ink.band},
    {x, y: percents("clean"), name: "clean", mode: "lines", line: {color: ink.soft, width: 2, dash: "dot"},
      hoverinfo: "skip"},
    {x, y: percents("mean"), name: "mean", mode: "lines", line: {color: ink.line, width: 2}, hoverinfo: "skip"},
    ...points.map(bar),
    {x: ringed.map(p => p.x), y: ringed.map(p => p.mean / 100), name: "marked", mode: "markers", hoverinfo: "skip",
      cliponaxis: false, marker: {symbol: "circle-open", size: 21, color: ink.ink, line: {width: 1.5}}},
    {x, y: percents("mean"), name: "points", mode: "markers", text: points.map(hover),
      hovertemplate: "%{text}<extra></extra>", cliponaxis: false,
      marker: {size: 11, color: colours, symbol: points.map(p => p.converged === p.networks ? "circle" : "circle-open"),
        line: {color: colours, width: 2.5}}},
    {x: fallen.map(p => p.x), y: fallen.map(() => bottom), name: "diverged", mode: "markers+text",
      text: fallen.map(p => `${p.diverged} of ${p.networks} diverged`), textposition: "top center",
      textfont: {color: ink.alarm, size: 11}, marker: {symbol: "x", size: 10, color: ink.alarm}, cliponaxis: false,
      hoverinfo: "skip"},
  ].map(trace => ({...trace, type: "scatter", showlegend: false}));
}

function annotation(p, words, points, axis, ink) {
  const side = p === points[0] ? {xanchor: "left", xshift: -12}
    : p === points[points.length - 1] ? {xanchor: "right", xshift: 12} : {};
  return {x: axis.type === "log" ? Math.log10(p.x) : p.x, y: p.mean / 100, text: words, showarrow: false, yshift: 22,
    ...side, borderpad: 1, bgcolor: ink.veil, font: {size: 12, color: ink.ink}};
}

function layoutOf(points, base, best, axis, range, value) {
  const scheme = night.matches ? "dark" : "light", ink = inks[scheme];
  const labels = base && base === best ? [[base, "base and best"]] : [[base, "base"], [best, "best"]].filter(([p]) => p);
  return {
    template: templates[scheme], margin: {l: 58, r: 18, t: 22, b: 58}, dragmode: false, hovermode: "closest",
    hoverlabel: {align: "left", bgcolor: ink.ground, bordercolor: ink.soft, font: {color: ink.ink}},
    xaxis: {...axis, title: {text: axis.title}, fixedrange: true, zeroline: false},
    yaxis: {range, title: {text: escaped(text(value)) + " (%)"}, fixedrange: true, zeroline: false},
    annotations: labels.map(([p, words]) => annotation(p, words, points, axis, ink)),
  };
}

function plot() {
  const curve = chosenCurve(), stop = +slider.value;
  const [value, name, , stops, means, lows, highs] = curve.questions[question.selectedIndex];
  const points = pointsOf(curve, means[stop], lows[stop], highs[stop]), measured = points.filter(p => p.mean !== null);
  const base = measured.find(p => p.density === 1);
  const best = measured.reduce((a, b) => a && a.mean >= b.mean ? a : b, null);
  const titles = curve.where.map(text), [, , asked, sign, method] = curve.words.map(text);
  const which = curve.questions.length > 1 ? ", " + text(name) : "";
  const strength = stops.length > 1 ? `, ${sign}${text(stops[stop])}` : "";
  find("title").textContent = `${titles[1]} on ${titles[0]}, growing in ${titles[2]}: ${asked}${which}${strength}`;
  find("method").textContent = `${method}; the rest is shared out over layers by ${titles[4]}.`;
  find("summary").textContent = summary(base, best);
  find("value").textContent = text(stops[stop]);
  slider.setAttribute("aria-valuetext", text(stops[stop]));
  find("rows").replaceChildren(...points.map(row));
  const range = bounds(curve, means, lows, highs), ink = inks[night.matches ? "dark" : "light"];
  Plotly.react("chart", traces(points, base, best, range[0], ink),
    layoutOf(points, base, best, data.axes[curve.axis], range, value), {responsive: true, displayModeBar: false});
}

// Listening: each control plots when it changes, the slider while it moves, the page when day turns to night.

function save() {
  const filename = find("title").textContent.replace(/[^A-Za-z0-9.-]+/g, "_");
  Plotly.downloadImage("chart", {format: "svg", width: 800, height: 450, filename});
}

for (const [i, control] of controls.entries()) {
  fill(control, [...new Set(data.curves.map(curve => curve.where[i]))]);
  control.addEventListener("change", chooseCurve);
}
question.addEventListener("change", chooseQuestion);
slider.addEventListener("input", plot);
night.addEventListener("change", plot);
find("save").addEventListener("click", save);
find("controls").addEventListener("submit", event => event.preventDefault());
chooseCurve();
