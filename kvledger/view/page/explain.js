"use strict";
// What is selected: what it is at this event, with links to its neighbours, and how it came to that.

const SETTLED = 120; // ms
const pasts = new Map();
let asking = 0, explained = null;

function past(subject, at) {
  const key = `${subject.type} ${subject.id} ${at}`;
  if (!pasts.has(key)) {
    if (pasts.size > 200) pasts.clear();
    pasts.set(key, log.explain(subject, at).catch((error) => {
      pasts.delete(key);
      return { now: [], lines: [], omitted: error.message };
    }));
  }
  return pasts.get(key);
}

async function drawExplain() {
  const subject = shown.subject, at = model.at, turn = ++asking;
  if (!subject) {
    timeline.marks = [];
    $("explain-title").textContent = "";
    $("explain-now").replaceChildren("Select a block, a run, a request or a transfer: click it, or press / and name it.");
    $("explain-past").replaceChildren();
    $("explain-note").textContent = "";
    return;
  }
  if (shown.tab !== "explain") return;
  if (subject !== explained) $("explain-past").replaceChildren();
  explained = subject;
  $("explain-title").textContent = subjectName(subject);
  $("explain-now").replaceChildren(...facts(subject));
  await new Promise((resolve) => setTimeout(resolve, SETTLED)); // not for every event that is run through
  if (turn !== asking) return;
  const { now, lines, omitted } = await past(subject, at);
  if (turn !== asking) return;
  const told = !TIERS.includes(subject.type) && model[`${subject.type}s`].has(subject.id); // the links say it all
  if (!told) $("explain-now").append(...now.map((line) => element("p", {}, line)));
  $("explain-past").replaceChildren(...lines.toReversed().map((line) => {
    const row = element("li", { className: line.n === at ? "current" : "" },
      element("span", { className: "number" }, number(line.n)), element("span", { className: "text" }, line.text));
    row.addEventListener("click", () => go(line.n));
    return row;
  }));
  $("explain-note").textContent = omitted;
  timeline.marks = lines.map((line) => line.n);
  timeline.draw();
}

// Token ids of a run's blocks, only where the user of this page asked for them with --words.
function wordsButton(run) {
  const button = element("button", { className: "link" }, "show its token ids");
  button.addEventListener("click", async () => {
    try {
      const { words } = await log.words(run, model.at);
      const lines = words.map((block, i) => `${i}: ${block.map((word) => (word < 0 ? "·" : word)).join(" ")}`);
      button.replaceWith(element("pre", {}, lines.join("\n")));
    } catch (error) {
      complain(error);
    }
  });
  return button;
}

// What is true of the subject at this event, with links to its neighbours.
function facts(subject) {
  const links = (ids, type) => ids.flatMap((id) => [subjectLink({ type, id }), " "]);
  if (TIERS.includes(subject.type)) {
    const kinds = model.blocks[subject.type].kinds;
    if (subject.id >= kinds.length) return ["not in the pool"];
    const owner = model.owner(subject.type, subject.id);
    return [`now ${KINDS[kinds[subject.id]]} `, ...(owner ? links([owner.id], owner.type) : [])];
  }
  const row = model[`${subject.type}s`].get(subject.id);
  if (!row) return [element("span", { className: "quiet" }, "does not exist at this event")];
  if (subject.type === "run") {
    const above = typeof row[0] === "number" ? links([row[0]], "run") : [row[0], " "];
    const below = [...model.runs].filter(([, run]) => run[0] === subject.id).map(([id]) => id);
    return [`blocks ${row[1]} to ${row[1] + row[2] - 1} of its path, ${runPlace(row)}, ${row[4]} pins`,
      row[6] ? ", not expected back" : "", "; above: ", ...above,
      ...(below.length ? ["below: ", ...links(below.slice(0, 12), "run")] : []),
      ...(row[5] ? ["in ", ...links([row[5]], "transfer")] : []),
      ...(summary.words ? [wordsButton(subject.id)] : [])];
  }
  if (subject.type === "request") {
    const path = model.path(row[1]).reverse();
    return [`${row[3]} blocks in its table, ${row[4]} of them its own; a path of ${row[2]} cached blocks`,
      ...(path.length ? [": ", ...links(path, "run")] : []),
      ...(row[5].length ? ["waits for ", ...links(row[5], "transfer")] : [])];
  }
  return [`${row[0]} of ${row[1]} blocks${row[2] ? ", quarantined" : ""}: `, ...links(row[3].slice(0, 20), "run"),
    ...(row[4].length ? ["for ", ...links(row[4], "request")] : [])];
}
