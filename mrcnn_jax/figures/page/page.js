"use strict";
// Texts of the data (names of files and classes, the config) become text nodes and attributes only, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = byId("truth").namespaceURI;
// Objects take turns with the palette of the other pictures (figures/draw.py).
const PALETTE = ["#ff6347", "#40c4ff", "#ffd60a", "#be82ff", "#3cdc82", "#ff82c8", "#ffa028", "#78e6dc", "#aac8ff", "#c8e650"];
const CROWD = "#bebebe";
const KINDS = { segm: "mask", bbox: "box", boundary: "boundary" };
const gallery = data.gallery;
// What is shown: a class (its index, or -1 for all), the least score of a detection, an image (its place in the list that is shown).
const state = { class: -1, score: gallery.score, kind: data.at_score.compared, order: "worst", list: [], place: 0 };

const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1));
const decimal = (value) => value.toFixed(2).replace(/^0(?=\.)/, "");
const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;
const className = (index) => (index < 0 ? "all classes" : data.classes[index].name);
const ofClass = (instance) => state.class < 0 || instance.class === state.class;

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// -- tables -------------------------------------------------------------------------------------------------------------------

const HEADS = { APs: "AP S", APm: "AP M", APl: "AP L", ARs: "AR S", ARm: "AR M", ARl: "AR L" };
const head = (name) => HEADS[name] || name;

function showFigures() {
  const names = Object.keys(data.figures.segm);
  const rows = Object.entries(data.figures).map(([kind, values]) =>
    html("tr", {}, html("th", { scope: "row" }, KINDS[kind]), ...names.map((name) => html("td", {}, percent(values[name])))));
  const top = html("tr", {}, html("th", { scope: "col" }, ""), ...names.map((name) => html("th", { scope: "col" }, head(name))));
  byId("figures-table").append(html("table", {}, html("thead", {}, top), html("tbody", {}, ...rows)));
  const recalls = Object.entries(data.recall).map(([name, value]) => {
    const [limit, size] = name.replace("recall@", "").split("/");
    return size ? `${size} ${percent(value)}` : `Recall of the first ${limit} proposals at IoU .5: all ${percent(value)}`;
  });
  byId("recall").textContent = recalls.join(", ");
}

const CLASS_FIGURES = ["AP", "AP50", "AP75", "APs", "APm", "APl"];
const columns = [
  { title: "class", value: (k) => data.classes[k].name },
  { title: "objects", value: (k) => data.classes[k].objects },
  ...["bbox", "segm"].flatMap((kind) => CLASS_FIGURES.map((name) => ({ title: head(name), value: (k) => data.class_figures[kind][k][name] }))),
];
const sorting = { column: -1, down: false }; // at first in the order of the data

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // what is undefined comes last, whichever way
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return sorting.down ? -order : order;
}

function showClasses() {
  const edge = (i) => (i === 2 || i === 8 ? { class: "edge" } : {});
  const order = data.classes.map((_, k) => k);
  if (sorting.column >= 0) order.sort((a, b) => compare(columns[sorting.column].value(a), columns[sorting.column].value(b)));
  const groups = html("tr", {}, html("td", { colspan: 2 }), html("th", { colspan: 6, scope: "colgroup", class: "group edge" }, "box"),
    html("th", { colspan: 6, scope: "colgroup", class: "group edge" }, "mask"));
  const heads = columns.map((column, i) => {
    const button = html("button", { type: "button" }, column.title);
    const cell = html("th", { scope: "col", ...edge(i) }, button);
    if (sorting.column === i) cell.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    if (sorting.column === i) button.append(sorting.down ? " ↓" : " ↑");
    button.addEventListener("click", () => {
      sorting.down = sorting.column === i ? !sorting.down : i > 0;
      sorting.column = i;
      showClasses();
      byId("classes-table").querySelectorAll("thead button")[i].focus();
    });
    return cell;
  });
  const rows = order.map((k) => {
    const button = html("button", { type: "button", "data-class": k, "aria-pressed": state.class === k }, className(k));
    button.addEventListener("click", () => chooseClass(state.class === k ? -1 : k));
    const cells = columns.slice(1).map((column, i) =>
      html("td", edge(i + 1), i === 0 ? String(column.value(k)) : percent(column.value(k))));
    return html("tr", state.class === k ? { class: "chosen" } : {}, html("th", { scope: "row" }, button), ...cells);
  });
  byId("classes-table").replaceChildren(html("table", {}, html("thead", {}, groups, html("tr", {}, ...heads)), html("tbody", {}, ...rows)));
}

// Precision, recall and F1 of each class at the score of the evaluation, and which class was taken for which.
function showConfusion() {
  const { compared, score, names, counts, rates } = data.at_score;
  const nothing = names.length;
  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const objects = counts.map((row) => sum(row));
  const detections = counts.map((_, k) => sum(counts.map((row) => row[k])));
  const seen = names.map((_, k) => k).filter((k) => objects[k] + detections[k] > 0);
  const cells = (tag, texts) => texts.map((text) => html(tag, tag === "th" ? { scope: "col" } : {}, text));
  const table = (place, top, rows) => byId(place).append(html("table", {}, html("thead", {}, html("tr", {}, ...cells("th", top))), html("tbody", {}, ...rows)));
  const row = (name, ...rest) => html("tr", {}, html("th", { scope: "row" }, name), ...rest);
  byId("confusion-text").textContent = `Detections with a score of at least ${score} (--score), compared by ${KINDS[compared]} at an IoU of .50; rates in percent.`;
  const rateRow = (name, k, of, found) => row(name, ...cells("td", [String(of), String(found), ...["precision", "recall", "F1"].map((rate) => percent(rates[k][rate]))]));
  table("rates-table", ["class", "objects", "detections", "precision", "recall", "F1"], [
    rateRow("all classes", nothing, sum(objects) - objects[nothing], sum(detections) - detections[nothing]),
    ...seen.map((k) => rateRow(names[k], k, objects[k], detections[k])),
  ]);
  const cell = (k, l) => html("td", k === l && k < nothing ? { class: "right" } : {}, k === nothing && l === nothing ? "" : counts[k][l] ? String(counts[k][l]) : "·");
  table("confusion-table", ["object ↓ detection →", ...seen.map((k) => names[k]), "missed"],
    [...seen, nothing].map((k) => row(k === nothing ? "false" : names[k], ...[...seen, nothing].map((l) => cell(k, l)))));
}

function showConfig() {
  const flat = (value, name) => {
    const nested = value !== null && typeof value === "object" && Object.keys(value).length > 0;
    const plain = Array.isArray(value) && !JSON.stringify(value).includes("{"); // a list of numbers is one value
    return nested && !plain ? Object.entries(value).flatMap(([key, inner]) => flat(inner, name ? `${name}.${key}` : key)) : [[name, value]];
  };
  const table = (rows) => html("table", {}, html("tbody", {}, ...rows.map(([name, value]) =>
    html("tr", {}, html("th", { scope: "row" }, name), html("td", {}, typeof value === "string" ? value : JSON.stringify(value))))));
  const simple = [];
  const sections = [];
  for (const [name, value] of Object.entries(data.config)) {
    const rows = flat(value, "");
    if (rows.length === 1 && rows[0][0] === "") simple.push([name, value]);
    else sections.push(html("details", {}, html("summary", {}, name), table(rows)));
  }
  byId("config-tables").append(table(simple), ...sections);
}

// -- curves -------------------------------------------------------------------------------------------------------------------

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) || 10);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.max(Math.floor(high / step + 1e-9) - first + 1, 0) }, (_, i) => Number(((first + i) * step).toPrecision(10)));
}

// An empty chart as wide as its place, with axes; `draw(x, y, area)` gets the scales and what it adds to is clipped.
function chart(place, { x, y, height = 270, draw }) {
  const width = Math.max(place.clientWidth, 260);
  const [left, right, top, bottom] = [58, 14, 12, 44];
  const xAt = (value) => left + ((value - x.range[0]) / (x.range[1] - x.range[0] || 1)) * (width - left - right);
  const yAt = (value) => height - bottom - ((value - y.range[0]) / (y.range[1] - y.range[0] || 1)) * (height - top - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-labelledby": place.parentElement.firstElementChild.id });
  for (const value of y.ticks || ticks(...y.range, 6)) {
    picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: yAt(value), y2: yAt(value) }),
      svg("text", { x: left - 7, y: yAt(value) + 4, "text-anchor": "end" }, y.text ? y.text(value) : String(value)));
  }
  for (const value of ticks(...x.range, width < 420 ? 4 : 8)) {
    picture.append(svg("line", { class: "axis", x1: xAt(value), x2: xAt(value), y1: height - bottom, y2: height - bottom + 5 }),
      svg("text", { x: xAt(value), y: height - bottom + 18, "text-anchor": "middle" }, String(value)));
  }
  picture.append(svg("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.label),
    svg("text", { transform: `translate(14 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label),
    svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  const area = svg("svg", { x: left, y: 0, width: width - left - right, height: height - bottom, viewBox: `${left} 0 ${width - left - right} ${height - bottom}` });
  draw(xAt, yAt, area);
  picture.append(area);
  place.replaceChildren(picture);
  return place;
}

// What is drawn how, and the name of each.
function legend(place, entries) {
  place.append(html("div", { class: "legend note" }, ...entries.map(([style, text]) =>
    html("span", {}, svg("svg", { class: "key", viewBox: "0 0 30 10" }, svg("path", { class: style, d: "M1 5h28" })), text))));
}

const line = (xs, ys, xAt, yAt) => xs.map((value, i) => `${i ? "L" : "M"}${xAt(value).toFixed(1)} ${yAt(ys[i]).toFixed(1)}`).join("");
const upright = (value, xAt, yAt, range) => svg("path", { class: "level", d: line([value, value], range, xAt, yAt) });

function showPrecision() {
  const curves = data.precision[state.kind][state.class + 1];
  const present = data.precision[state.kind].slice(1).filter(Boolean).length;
  const of = state.class < 0 ? `mean of ${count(present, "class", "classes")}` : className(state.class);
  byId("precision-title").textContent = `Precision and recall, ${KINDS[state.kind]}: ${of}`;
  if (!curves) {
    byId("precision").replaceChildren(html("p", { class: "note" }, present ? "There is no object of this class." : "There are no such results."));
    return;
  }
  const recall = Array.from({ length: curves.AP50.length }, (_, i) => i / (curves.AP50.length - 1));
  const lines = [["first", "IoU .50", curves.AP50], ["second", "IoU .75", curves.AP75], ["third", "mean of IoU .50 to .95", curves.mean]];
  chart(byId("precision"), {
    x: { range: [0, 1], label: "recall" },
    y: { range: [0, 1.02], label: "precision" },
    draw: (xAt, yAt, area) => {
      for (const [style, , values] of lines) area.append(svg("path", { class: style, d: line(recall, values, xAt, yAt) }));
      const reached = curves.scores ? recall.findLastIndex((_, i) => curves.AP50[i] > 0 && curves.scores[i] >= state.score) : -1;
      if (reached >= 0) area.append(svg("circle", { class: "first", cx: xAt(recall[reached]), cy: yAt(curves.AP50[reached]), r: 5 }));
    },
  });
  legend(byId("precision"), lines.map(([style, text]) => [style, text]));
  if (curves.scores) byId("precision").append(html("p", { class: "note" }, `The dot: detections with a score of at least ${decimal(state.score)}.`));
}

function showHistogram() {
  const { true: right, false: wrong } = data.histogram[state.kind][state.class + 1];
  const most = Math.max(...right, ...wrong, 9);
  const scale = (number) => Math.log10(1 + number);
  const powers = Array.from({ length: Math.ceil(Math.log10(most)) + 1 }, (_, i) => 10 ** i);
  const numbers = [0, ...powers].filter((number) => number <= most);
  byId("histogram-title").textContent = `Scores of detections, ${KINDS[state.kind]}: ${className(state.class)}`;
  chart(byId("histogram"), {
    x: { range: [0, 1], label: "score" },
    y: { range: [0, scale(most) * 1.04], label: "detections (logarithmic)", ticks: numbers.map(scale), text: (value) => String(Math.round(10 ** value - 1)) },
    draw: (xAt, yAt, area) => {
      const width = (xAt(1) - xAt(0)) / right.length;
      right.forEach((_, i) => [["true", right[i]], ["false", wrong[i]]].forEach(([style, number], side) => {
        const bar = svg("rect", { class: style, x: xAt(i / right.length) + width * (0.08 + 0.42 * side), y: yAt(scale(number)), width: width * 0.42, height: yAt(0) - yAt(scale(number)) });
        bar.append(svg("title", {}, `score ${decimal(i / right.length)} to ${decimal((i + 1) / right.length)}: ${number} ${style}`));
        area.append(bar);
      }));
      area.append(upright(state.score, xAt, yAt, [0, scale(most)]));
    },
  });
  legend(byId("histogram"), [["true", "true: matched at IoU .5"], ["false", "false"], ["level", "the score chosen above"]]);
}

function showTraining() {
  const place = byId("training-charts");
  place.replaceChildren();
  if (!data.training.length) place.append(html("p", {}, "The run's folder holds no metrics.jsonl."));
  const styles = ["first", "second", "third", "fourth"];
  for (const { stage, panels } of data.training) {
    const charts = html("div", { class: "charts" });
    place.append(html("h3", {}, `stage ${stage}`), charts);
    const bodies = panels.map((panel, number) => {
      const body = html("div", { class: "chart" });
      charts.append(html("figure", {}, html("figcaption", { id: `training-${place.children.length}-${number}` }, panel.title), body));
      return body;
    });
    // Drawn when all are in their places: a chart is as wide as its place.
    panels.forEach(({ label, series }, number) => {
      // The first steps' losses can be many times the others: let them leave the picture rather than flatten it.
      const settled = series.flatMap(({ y, high }) => (high ? y.slice(Math.ceil(y.length / 10)) : y));
      const spikes = series.flatMap(({ high }) => (high ? high.slice(Math.ceil(high.length / 10)) : [])).sort((a, b) => a - b);
      const top = Math.max(1.25 * Math.max(...settled), spikes[Math.floor(0.95 * spikes.length)] || 0) || 1;
      chart(bodies[number], {
        x: { range: [0, 1.02 * Math.max(...series.flatMap(({ x }) => x), 1)], label: "step" },
        y: { range: [0, label === "recall" ? 1.02 : top], label },
        height: 230,
        draw: (xAt, yAt, area) => series.forEach(({ x, y, low, high }, i) => {
          const style = styles[i % styles.length];
          if (low) area.append(svg("path", { class: `${style} band`, d: `${line(x, high, xAt, yAt)}${line(x.toReversed(), low.toReversed(), xAt, yAt).replace("M", "L")}Z` }));
          area.append(svg("path", { class: style, d: line(x, y, xAt, yAt) }));
          if (!low) area.append(...x.map((value, j) => svg("circle", { class: style, cx: xAt(value), cy: yAt(y[j]), r: 3 })));
        }),
      });
      legend(bodies[number], series.map(({ name, low }, i) => [styles[i % styles.length], low ? `${name}: mean and range of a few steps` : name]));
    });
  }
}

// -- images -------------------------------------------------------------------------------------------------------------------

const shown = () => state.list[state.place];
const picture = (image) => `data:image/jpeg;base64,${image.jpeg}`;
const drawn = (image) => image.detections.filter((detection) => ofClass(detection) && detection.score >= state.score);
// An object is found by the detection that COCO gives it, unless that one's score is too low.
const found = (image) => new Set(image.detections.filter((d) => d.match !== null && d.score >= state.score).map((d) => d.match));

// Labels that would cover more than this share of a picture are smaller; under the least size they are left out.
const [LABEL_SHARE, LABEL_SIZE, LEAST_SIZE] = [1 / 3, 13, 10];

// What is drawn over one picture; `style(instance)` is "match", "no-match" or "ignored". Whether its labels were left out.
function overlay(picture_, image, instances, style, text) {
  const [withMasks, withLabels] = [byId("masks").checked, byId("labels").checked];
  picture_.setAttribute("viewBox", `0 0 ${image.width} ${image.height}`);
  const parts = [svg("image", { href: picture(image), width: image.width, height: image.height, preserveAspectRatio: "none" })];
  const color = (instance) => (style(instance) === "ignored" ? CROWD : PALETTE[instance.color % PALETTE.length]);
  if (withMasks) {
    for (const one of instances) if (one.path) parts.push(svg("path", { class: "mask", d: one.path, fill: color(one), stroke: color(one) }));
  }
  for (const one of instances) {
    const [x, y, width, height] = one.box;
    parts.push(svg("rect", { class: `box ${style(one)}`, x, y, width, height, stroke: color(one) }));
  }
  picture_.replaceChildren(...parts);
  if (!withLabels) return false;
  // Text is as large on a phone as on a wide screen, and on small images as on large ones.
  const area = picture_.getBoundingClientRect();
  const unit = 1 / Math.min(area.width / image.width || 1, area.height / image.height || 1);
  const labels = instances.map((one) => svg("text", { fill: color(one), "font-size": LABEL_SIZE * unit, "stroke-width": 3 * unit }, text(one)));
  picture_.append(...labels);
  const covered = labels.reduce((sum, label) => sum + label.getBBox().width * label.getBBox().height, 0);
  const size = LABEL_SIZE * Math.min(1, Math.sqrt((LABEL_SHARE * image.width * image.height) / (covered || 1)));
  if (size < LEAST_SIZE) {
    labels.forEach((label) => label.remove());
    return true;
  }
  instances.forEach((one, i) => {
    const y = one.box[1] > (size + 2) * unit ? one.box[1] - 4 * unit : one.box[1] + size * unit;
    labels[i].setAttribute("font-size", size * unit);
    labels[i].setAttribute("y", y);
    const end = one.box[0] + 2 * unit + labels[i].getBBox().width - image.width;
    labels[i].setAttribute("x", Math.max(one.box[0] + 2 * unit - Math.max(end, 0), 0));
  });
  return false;
}

function showImage() {
  const image = shown();
  const strip = byId("strip");
  [...strip.children].forEach((button, i) => {
    button.setAttribute("aria-current", i === state.place);
    button.tabIndex = i === state.place ? 0 : -1; // one stop for the tabulator, not sixty
  });
  byId("previous").disabled = !image || state.place === 0;
  byId("next").disabled = !image || state.place === state.list.length - 1;
  document.querySelector(".pair").hidden = !image;
  if (!image) {
    byId("caption").textContent = `No image of the gallery shows ${className(state.class)}.`;
    return;
  }
  const hits = found(image);
  const objects = image.objects.map((object, i) => ({ ...object, color: i, found: hits.has(i) })).filter(ofClass);
  // A detection has the colour of the object that it matches, others have those that follow.
  const colors = new Map(image.detections.map((one, i) => [one, one.match ?? image.objects.length + i]));
  const detections = drawn(image).map((one) => ({ ...one, color: colors.get(one) }));
  const counted = objects.filter((object) => !object.crowd);
  const wrong = detections.filter((detection) => detection.match === null && !detection.ignored);
  byId("caption").textContent = `${state.place + 1} of ${state.list.length}: ${image.name}, quality ${decimal(image.quality)}`;
  const left = (text, without) => text + (without ? "; no room for labels" : "");
  const truth = `Ground truth: ${count(counted.length, "object", "objects")}, ${counted.filter((object) => object.found).length} found`;
  byId("truth-text").textContent = left(truth, overlay(byId("truth"), image, objects, (one) => (one.crowd ? "ignored" : one.found ? "match" : "no-match"),
    (one) => className(one.class) + (one.crowd ? " (crowd)" : "")));
  const told = `Detections: ${detections.length}, ${wrong.length} of them false`;
  byId("found-text").textContent = left(told, overlay(byId("found"), image, [...detections].reverse(), (one) => (one.ignored ? "ignored" : one.match === null ? "no-match" : "match"),
    (one) => `${className(one.class)} ${decimal(one.score)}${one.depth ? ` ${decimal(one.depth)} m` : ""}`));
  const current = strip.children[state.place];
  if (strip.contains(document.activeElement)) current.focus({ preventScroll: true });
  strip.scrollLeft = current.offsetLeft - (strip.clientWidth - current.offsetWidth) / 2;
}

function step(by) {
  state.place = Math.min(Math.max(state.place + by, 0), state.list.length - 1);
  showImage();
}

// The images that show the class: by an object, or by a detection of the score by which images are ranked.
function showList() {
  const before = shown();
  const shows = (image) => image.objects.some(ofClass) || image.detections.some((one) => ofClass(one) && one.score >= gallery.score);
  state.list = gallery.images.filter(shows);
  if (state.order === "best") state.list.reverse();
  state.place = Math.max(state.list.indexOf(before), 0);
  byId("strip").replaceChildren(...state.list.map((image, i) => {
    const button = html("button", { type: "button", "aria-label": `image ${i + 1}, quality ${decimal(image.quality)}` },
      html("img", { src: picture(image), alt: "", loading: "lazy" }), decimal(image.quality));
    button.addEventListener("click", () => step(i - state.place));
    return button;
  }));
  showImage();
}

function chooseClass(index) {
  state.class = index;
  byId("class").value = String(index);
  showClasses();
  showPrecision();
  showHistogram();
  showList();
}

function showScore() {
  state.score = byId("score").valueAsNumber;
  byId("score-text").textContent = decimal(state.score);
  showPrecision();
  showHistogram();
  showImage();
}

// -- the page -----------------------------------------------------------------------------------------------------------------

function start() {
  const { images, objects, detections } = data.totals;
  const counts = `${count(images, "image", "images")}, ${count(objects, "object", "objects")}, ${count(detections, "detection", "detections")}`;
  for (const [label, text] of Object.entries({ ...data.heading, evaluated: counts })) byId("heading").append(html("dt", {}, label), html("dd", {}, text));
  if (data.heading.run) document.title = `Evaluation of ${data.heading.run}`;
  byId("class").append(html("option", { value: -1 }, "all classes"), ...data.classes.map((one, k) => html("option", { value: k }, one.name)));
  byId("score").value = String(state.score);
  const best = Math.floor(gallery.images.length / 2);
  const part = gallery.images.length < gallery.ranked ? `The ${gallery.images.length - best} worst and ${best} best of the ${gallery.ranked} images` : "All images";
  byId("ranking").textContent = `${part} that have an object or a detection with a score of at least ${decimal(gallery.score)}. The number is the image's panoptic quality at `
    + "that score, all classes together: the sum of the matched pairs' IoUs over the number of pairs and half of what is missed or false; 1 is perfect.";

  byId("class").addEventListener("change", (event) => chooseClass(Number(event.target.value)));
  byId("score").addEventListener("input", showScore);
  byId("matched-by").textContent = KINDS[data.at_score.compared];
  byId("kind").value = state.kind;
  byId("kind").addEventListener("change", (event) => {
    state.kind = event.target.value;
    showPrecision();
    showHistogram();
  });
  byId("order").addEventListener("change", (event) => {
    state.order = event.target.value;
    state.list = [];
    showList();
  });
  byId("masks").addEventListener("change", showImage);
  byId("labels").addEventListener("change", showImage);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select")) return;
    const arrow = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const box = { m: "masks", l: "labels" }[event.key];
    if (box) byId(box).click();
    else if (arrow && !event.target.closest("input[type=range], [role=region]")) {
      event.preventDefault();
      step(arrow);
    }
  });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar comes and goes
    width = window.innerWidth;
    showPrecision();
    showHistogram();
    showTraining();
    showImage();
  });

  showFigures();
  showConfusion();
  showConfig();
  showTraining();
  byId("score-text").textContent = decimal(state.score);
  chooseClass(-1);
}

start();
