const box = document.querySelector("input"), count = document.querySelector("output");
const dialog = document.querySelector("dialog"), full = document.querySelector(".full");
const entries = [...document.querySelectorAll("[data-entry]")];
const marks = typeof Highlight === "undefined" ? null : CSS.highlights;

// Search: all places of a text, one after the other.

const LINES = "h2, h3, p, pre, li, td, th, summary, .line";
let lines = null, places = [], here = -1;

// Each line of text with its text nodes, in which a match may begin and end.
function read() {
  return entries.flatMap(entry => [entry, ...entry.querySelectorAll(LINES)]).filter(line => line.matches(LINES)).map(line => {
    const nodes = [], walk = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
    let text = "";
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
      nodes.push([text.length, node]);
      text += node.data;
    }
    return {text: text.toLowerCase(), nodes};
  });
}

function point(nodes, offset, end) {
  let at = nodes.length - 1;
  while (at > 0 && (end ? nodes[at][0] >= offset : nodes[at][0] > offset)) at--;
  return [nodes[at][1], Math.min(offset - nodes[at][0], nodes[at][1].length)];
}

function search() {
  const wanted = box.value.trim().toLowerCase();
  lines ??= read();
  places = [];
  for (const {text, nodes} of wanted ? lines : []) {
    for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
      const range = new Range();
      range.setStart(...point(nodes, at, false));
      range.setEnd(...point(nodes, at + wanted.length, true));
      places.push(range);
    }
  }
  marks?.set("found", new Highlight(...places));
  here = -1;
  if (places.length) step(1); else marks?.delete("here");
  if (!places.length) count.textContent = wanted ? "none" : "";
}

function step(by) {
  if (!places.length) return;
  here = (here + by + places.length) % places.length;
  count.textContent = `${here + 1} of ${places.length}`;
  marks?.set("here", new Highlight(places[here]));
  show(places[here].startContainer.parentElement);
}

function show(element) {
  for (let fold = element.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  element.scrollIntoView({block: "center"});
}

box.addEventListener("input", search);
box.addEventListener("keydown", event => {
  if (event.key === "Enter") step(event.shiftKey ? -1 : 1);
  if (event.key === "Escape") { box.value = ""; search(); box.blur(); }
});

// Changes of code.

const changes = [...document.querySelectorAll(".change")];
let change = -1;
function go(by) {
  if (!changes.length) return;
  change = change < 0 ? (by > 0 ? 0 : changes.length - 1) : (change + by + changes.length) % changes.length;
  show(changes[change]);
  changes[change].scrollIntoView({block: "start"});
  changes[change].focus({preventScroll: true});
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.activeElement === box || dialog.open) return;
  if (event.key === "/") { event.preventDefault(); box.focus(); box.select(); }
  if (event.key === "n") go(1);
  if (event.key === "p") go(-1);
});

// The map: one stop of the tabulator, arrows within.

const rows = [...document.querySelectorAll(".mhf-blocks")].map(row => [...row.children]);
const blocks = rows.flat();
function stop(block) {
  for (const other of blocks) other.tabIndex = other === block ? 0 : -1;
}
if (blocks.length) stop(blocks[0]);
for (const [y, row] of rows.entries()) {
  for (const [x, block] of row.entries()) {
    block.addEventListener("focus", () => stop(block));
    block.addEventListener("keydown", event => {
      const [dy, dx] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key] ?? [0, 0];
      if (!dy && !dx) return;
      event.preventDefault();
      const next = rows[y + dy] ?? row;
      next[Math.max(0, Math.min(x + dx, next.length - 1))].focus();
    });
  }
}

// Pictures in full size.

for (const picture of document.querySelectorAll(".picture")) {
  picture.addEventListener("click", () => {
    full.replaceChildren(picture.firstElementChild.cloneNode(true));
    dialog.showModal();
  });
}
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
