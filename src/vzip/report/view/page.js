"use strict";
// Everything shown goes in as text (textContent, attributes set by value): no text of the data is ever parsed as HTML.
const content = JSON.parse(document.getElementById("content").textContent);
const { runs, base, samples, images } = content;
const ROW = 56, SPARE = 6; // pixels of a row; rows drawn beyond what is visible
const NUM_COLOURS = 5; // more colours than these are noise: all smaller groups are grey
const OVERLAYS = [["kept", "kept patches"], ["groups", "merge groups"], ["none", "image alone"]];
const pair = runs.length === 2;
const other = pair ? 1 - base : 0;
const names = runs.map((run) => run.name);
const OUTCOMES = pair
  ? [["", "all"], ["lost", `${names[base]} right, ${names[other]} wrong`],
     ["gained", `${names[other]} right, ${names[base]} wrong`], ["wrong", "both wrong"], ["right", "both right"],
     ["differ", "answers differ"]]
  : [["", "all"], ["wrong", "wrong"], ["right", "right"]];
const RANGES = ["qmin", "qmax", "amin", "amax"];
const byKey = new Map(samples.map((sample) => [sample.key, sample]));
const $ = (id) => document.getElementById(id);
// f: outcome, t: task, c: category, q: text, lengths, s: sample, o: overlay.
const FRESH = { f: "", t: "", c: "", q: "", qmin: "", qmax: "", amin: "", amax: "" };
let state = { ...FRESH, s: "", o: "kept" };
let shown = [];
let waiting;

for (const sample of samples) {
  sample.text = [sample.question, sample.target, ...sample.answers, sample.task, sample.id, sample.key, sample.category].join("\n").toLowerCase();
  sample.lengths = [sample.question.length, Math.max(...sample.answers.map((answer) => answer.length))];
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawn(tag, properties) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) made.setAttribute(name, value);
  return made;
}

// ---- the state and the address

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...FRESH, s: "", o: "kept" };
  for (const key of Object.keys(state)) if (given.has(key)) state[key] = given.get(key);
  if (!OUTCOMES.some(([value]) => value === state.f)) state.f = "";
  if (!OVERLAYS.some(([value]) => value === state.o)) state.o = "kept";
  for (const key of RANGES) if (!/^\d+$/.test(state[key])) state[key] = "";
}

function address(of = state) {
  const kept = Object.entries(of).filter(([key, value]) => value !== "" && !(key === "o" && value === "kept"));
  return `#${new URLSearchParams(kept)}`;
}

function set(changes) {
  const filters = Object.keys(changes).some((key) => key in FRESH);
  state = { ...state, ...changes };
  if (filters) filter();
  draw();
  // Not at every press of a held key: browsers refuse addresses that change too often.
  clearTimeout(waiting);
  waiting = setTimeout(() => history.replaceState(null, "", address()), 250);
}

function passes(sample) {
  const { f, t, c, q } = state;
  if (f === "differ" ? sample.same : f && sample.outcome !== f) return false;
  if ((t && sample.task !== t) || (c && sample.category !== c)) return false;
  const [question, answer] = sample.lengths;
  if ((state.qmin && question < +state.qmin) || (state.qmax && question > +state.qmax)) return false;
  if ((state.amin && answer < +state.amin) || (state.amax && answer > +state.amax)) return false;
  return !q || sample.text.includes(q.toLowerCase());
}

function filter() {
  shown = samples.filter(passes);
  $("list").scrollTop = 0;
}

// ---- drawing

function draw() {
  for (const button of $("outcomes").children) button.setAttribute("aria-pressed", String(button.value === state.f));
  for (const [id, key] of [["search", "q"], ["task", "t"], ...RANGES.map((name) => [name, name])]) {
    if ($(id).value !== state[key]) $(id).value = state[key];
  }
  if (RANGES.some((name) => state[name])) $("more").open = true;
  drawCategories();
  const place = shown.findIndex((sample) => sample.key === state.s);
  $("count").textContent = `${place >= 0 ? `${place + 1} of ` : ""}${shown.length.toLocaleString("en")}${shown.length < samples.length ? ` (of ${samples.length.toLocaleString("en")})` : ""} questions`;
  document.body.classList.toggle("reading", byKey.has(state.s));
  reveal(place);
  drawRows();
  drawDetail(place);
}

function drawCategories() {
  const there = [...new Set(samples.filter((sample) => !state.t || sample.task === state.t).map((sample) => sample.category))].filter(Boolean).sort();
  if (state.c && !there.includes(state.c)) there.push(state.c);
  const signature = JSON.stringify(there);
  if ($("category").dataset.of !== signature) {
    $("category").dataset.of = signature;
    $("category").replaceChildren(element("option", { value: "" }, "all categories"), ...there.map((name) => element("option", { value: name }, name)));
  }
  $("category").value = state.c;
  $("category").hidden = !there.length;
}

function reveal(place) {
  const list = $("list");
  $("spacer").style.height = `${shown.length * ROW}px`;
  if (place < 0 || !list.clientHeight) return;
  if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
  else if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
}

function drawRows() {
  const list = $("list");
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  const rows = shown.slice(first, last).map((sample, number) => {
    const row = element("div", {
      class: `row ${sample.outcome}`, role: "option", id: `row-${first + number}`,
      "aria-selected": String(sample.key === state.s), onclick: () => set({ s: sample.key }),
    }, element("div", {}, sample.question), element("div", { class: "answers" }, answersLine(sample)));
    row.style.top = `${(first + number) * ROW}px`;
    return row;
  });
  if (!shown.length) rows.push(element("p", { class: "empty" }, "No question passes these filters."));
  $("spacer").replaceChildren(...rows);
  const chosen = rows.find((row) => row.getAttribute("aria-selected") === "true");
  if (chosen) list.setAttribute("aria-activedescendant", chosen.id);
  else list.removeAttribute("aria-activedescendant");
}

function answersLine(sample) {
  const told = sample.answers.map((answer, number) => `${symbol(sample.scores[number])}${answer || "(empty)"}`);
  return `${pair ? `${told[base]}  →  ${told[other]}` : told[0]}  ·  reference: ${sample.target || "(none)"}  ·  ${sample.task}`;
}

const symbol = (score) => (score === null ? "" : score === 1 ? "✓ " : score === 0 ? "✗ " : `${number(score)} `);
const number = (value, digits = 2) => (value === null || value === undefined ? "" : String(+value.toFixed(digits)));

function drawDetail(place) {
  const detail = $("detail"), sample = byKey.get(state.s);
  if (!sample) {
    detail.replaceChildren(element("p", { class: "empty" }, state.s
      ? "The question that this link names is not in this page." : "Choose a question: click, or press j."));
    return;
  }
  const order = pair ? [base, other] : [0];
  const facts = element("div", { class: `facts outcome-${sample.outcome}` },
    element("span", { class: "steps" }, element("button", { id: "back", onclick: () => set({ s: "" }) }, "‹ list"),
      element("button", { id: "before", "aria-label": "question before", onclick: () => move(-1) }, "↑"),
      element("button", { id: "next", "aria-label": "next question", onclick: () => move(1) }, "↓")),
    element("span", {}, sample.task), element("span", {}, `question ${sample.id}`));
  if (sample.category) facts.append(element("span", {}, sample.category));
  const outcome = OUTCOMES.find(([value]) => value === sample.outcome);
  if (outcome && sample.outcome) facts.append(element("b", {}, outcome[1]));
  if (pair) facts.append(element("span", {}, sample.same ? "same answer" : "answers differ"));
  facts.append(element("a", { href: address({ ...FRESH, s: sample.key, o: state.o }) }, "link"),
    element("button", { id: "copy", onclick: copy }, "copy link"));
  const answers = element("dl", {}, element("dt", {}, "reference"), element("dd", { class: "target" }, sample.target || "(none)"));
  for (const which of order) {
    const score = sample.scores[which];
    const mark = element("span", { class: `mark ${score === null ? "" : score === 1 ? "yes" : score === 0 ? "no" : "part"}` }, symbol(score).trim());
    const tokens = sample.num_tokens[which];
    answers.append(element("dt", {}, names[which]),
      element("dd", { class: `answer-${which}` }, mark, element("span", { class: "answer" }, sample.answers[which] || "(empty)"),
        tokens && tokens.length ? element("span", { class: "note" }, `   ${tokens.join(" + ")} visual tokens`) : ""));
  }
  const pictures = element("div", { class: "pictures" });
  for (const view of sample.views) {
    const kept = order.filter((which) => view.kept[which]);
    if (!kept.length) pictures.append(picture(view.image, null, sample));
    for (const which of kept) pictures.append(picture(view.kept[which].image, view.kept[which], sample, names[which]));
  }
  detail.replaceChildren(facts, element("h2", {}, sample.question), answers);
  if (place < 0) detail.append(element("p", { class: "note" }, "This question does not pass the filters that are set."));
  if (sample.note) detail.append(element("p", { class: "note" }, sample.note));
  if (sample.views.some((view) => view.kept.some(Boolean))) {
    detail.append(element("div", { id: "overlays", role: "group", "aria-label": "drawn over the image" },
      ...OVERLAYS.map(([value, text]) => element("button", { value, "aria-pressed": String(value === state.o), onclick: () => set({ o: value }) }, text)),
      element("kbd", {}, "o")));
  }
  detail.append(pictures);
}

function cells(patches, columns) {
  return patches.map((patch) => `M${patch % columns} ${Math.floor(patch / columns)}h1v1h-1z`).join("");
}

function picture(image, kept, sample, name) {
  const { src, width, height } = images[image];
  const box = element("div", { class: "picture" }, element("img", { src, width, height, alt: `image of question ${sample.id}` }));
  let told = "";
  if (kept && state.o !== "none") {
    const [rows, columns] = kept.grid, all = rows * columns;
    const layer = drawn("svg", { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    const inside = new Set(kept.kept);
    const merged = new Set(kept.groups.flatMap(([, members]) => members));
    if (state.o === "kept") {
      layer.append(drawn("path", { class: "dim", d: cells([...Array(all).keys()].filter((patch) => !inside.has(patch)), columns) }),
        drawn("path", { class: "frame", d: cells(kept.kept, columns) }));
    } else {
      layer.append(drawn("path", { class: "dim", d: cells([...Array(all).keys()].filter((patch) => !inside.has(patch) && !merged.has(patch)), columns) }));
      const bySize = [...kept.groups].sort((a, b) => b[1].length - a[1].length);
      bySize.forEach(([, members], place) => layer.append(drawn("path", { class: `tint tint-${Math.min(place, NUM_COLOURS)}`, d: cells(members, columns) })));
      layer.append(drawn("path", { class: "edge", d: cells(kept.groups.map(([target]) => target).filter((target) => target >= 0), columns) }));
    }
    box.append(layer);
    const dropped = all - new Set([...kept.kept, ...merged]).size;
    told = state.o === "kept"
      ? `${kept.kept.length} of ${all} patches kept (framed); the others dimmed`
      : `${merged.size} patches merged into ${kept.groups.length} tokens: the ${Math.min(NUM_COLOURS, kept.groups.length)} largest groups have a colour each, the patch whose place a token takes is outlined; ${kept.kept.length} kept as they are; ${dropped} dropped (dimmed)`;
  }
  return element("figure", {}, box, element("figcaption", {}, [name, told].filter(Boolean).join(": ")));
}

// ---- scores

function drawScores() {
  const percent = (value) => (value === null || value === undefined ? "" : `${number(100 * value, 1)} %`);
  const head = pair
    ? ["task, category", "questions", names[base], names[other], "difference", "retention [95 %]", `only ${names[base]} right`, `only ${names[other]} right`, "p", "same answers"]
    : ["task, category", "questions", "score"];
  const lines = [];
  for (const task of content.tasks) {
    for (const group of task.groups) {
      const name = group.category === null ? task.name + (task.metric ? ` (${task.metric})` : "") : group.category;
      const choose = element("button", { onclick: () => set({ t: task.name, c: group.category || "" }) }, name);
      const texts = [group.num_questions.toLocaleString("en")];
      if (pair) {
        const [ours, theirs] = [group.scores[other], group.scores[base]];
        const [point, low, high] = group.retention || [];
        texts.push(number(theirs), number(ours), ours === null || theirs === null ? "" : number(ours - theirs),
          point === undefined ? "" : `${percent(point)} [${number(100 * low, 1)}, ${number(100 * high, 1)}]`,
          number(group.lost, 0), number(group.gained, 0),
          group.p === null || group.p === undefined ? "" : group.p < 0.001 ? "< 0.001" : number(group.p, 3), percent(group.same));
      } else texts.push(number(group.scores[0]));
      lines.push(element("tr", { class: `${group.category === null ? "" : "of-category"} ${group.outside_noise ? "apart" : ""}` },
        element("td", {}, choose), ...texts.map((text) => element("td", {}, text))));
    }
  }
  const remarks = [...content.remarks];
  if (pair) {
    remarks.push(`Retention: ${names[other]} / ${names[base]} with a 95 % bootstrap interval over questions; only … right: questions that only that run answered rightly; p: McNemar's exact test. Bold: the interval leaves 100 % out and p, where there is one, is below 0.05; each line is judged for itself.`);
    remarks.push("Of graded answers, right is what scores more than the other; both wrong is a score of 0.");
  }
  for (const run of runs) remarks.push(`${run.name}: ${run.title}. ${run.compressor}${run.pruner ? `; ${run.pruner}` : ""}. ${run.path}, ${run.created || "no date"}`);
  $("scores").replaceChildren(
    element("table", {}, element("thead", {}, element("tr", {}, ...head.map((text) => element("th", {}, text)))), element("tbody", {}, ...lines)),
    element("ul", {}, ...remarks.map((text) => element("li", {}, text))));
}

// ---- what a person does

function move(by) {
  if (!shown.length) return;
  const place = shown.findIndex((sample) => sample.key === state.s);
  const next = place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by));
  set({ s: shown[next].key });
}

function nextOverlay() {
  const place = OVERLAYS.findIndex(([value]) => value === state.o);
  set({ o: OVERLAYS[(place + 1) % OVERLAYS.length][0] });
}

function toggleScores() {
  $("scores").hidden = !$("scores").hidden;
  $("show-scores").setAttribute("aria-expanded", String(!$("scores").hidden));
  drawRows();
}

async function copy() {
  const text = location.href.split("#")[0] + address();
  try {
    await navigator.clipboard.writeText(text);
    $("copy").textContent = "copied";
  } catch {
    // Not allowed here: the address to copy by hand.
    const field = element("input", { readonly: "", value: text, "aria-label": "link" });
    $("copy").replaceWith(field);
    field.select();
  }
}

const KEYS = {
  j: ["next question", () => move(1)], ArrowDown: ["", () => move(1)],
  k: ["question before", () => move(-1)], ArrowUp: ["", () => move(-1)],
  "/": ["search", () => { set({ s: matchMedia("(max-width: 760px)").matches ? "" : state.s }); $("search").focus(); }],
  o: ["overlay: kept patches, merge groups, none", nextOverlay],
  s: ["scores of tasks and categories", toggleScores],
  c: ["copy a link to this question with these filters", copy],
  x: ["clear all filters", () => set(FRESH)],
  "?": ["this help", () => $("help").showModal()],
  Escape: ["leave search; back to the list on a phone", () => { if (document.body.classList.contains("reading")) set({ s: "" }); }],
};
OUTCOMES.forEach(([value, text], number) => { KEYS[number] = [text, () => set({ f: value })]; });

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key in KEYS && !(event.target.matches("button, a") && event.key === "Enter")) {
    event.preventDefault();
    KEYS[event.key][1]();
  }
});

function start() {
  $("heading").append(pair ? `${runs[other].title}` : runs[0].title,
    element("small", {}, pair ? `against ${runs[base].title}` : `${samples.length.toLocaleString("en")} questions`));
  $("outcomes").append(...OUTCOMES.map(([value, text], number) => {
    const count = samples.filter((sample) => (value === "differ" ? !sample.same : !value || sample.outcome === value)).length;
    return element("button", { type: "button", value, onclick: () => set({ f: value }) }, `${text} ${count.toLocaleString("en")} `, element("kbd", {}, String(number)));
  }));
  $("task").append(element("option", { value: "" }, "all tasks"), ...content.tasks.map(({ name }) => element("option", { value: name }, name)));
  $("help").append(element("h2", {}, "Keys"),
    element("dl", {}, ...Object.entries(KEYS).filter(([, [text]]) => text).flatMap(([key, [text]]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)])),
    element("p", { class: "note" }, "The address holds the filters and the question: send it with this file, and it opens the same."),
    element("form", { method: "dialog" }, element("button", {}, "Close")));
  drawScores();
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", () => set({ q: $("search").value }));
  $("task").addEventListener("change", () => set({ t: $("task").value, c: "" }));
  $("category").addEventListener("change", () => set({ c: $("category").value }));
  for (const name of RANGES) $(name).addEventListener("input", () => set({ [name]: $(name).value }));
  $("clear").addEventListener("click", () => set(FRESH));
  $("show-scores").addEventListener("click", toggleScores);
  $("show-help").addEventListener("click", () => $("help").showModal());
  $("list").addEventListener("scroll", drawRows, { passive: true });
  addEventListener("resize", drawRows);
  addEventListener("hashchange", () => { readAddress(); filter(); draw(); });
  readAddress();
  filter();
  draw();
}

start();
