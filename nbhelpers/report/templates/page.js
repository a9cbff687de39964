"use strict";

// The page is whole without this script. It adds: pointing at a model and choosing one, in the picture, in its list and
// in the table at once; another cost across the picture; sorting the table; figures in large.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.append(text, ...children);
  return made;
}

/** Put what an element holds into a button in it. */
function makeButton(holder) {
  const button = element("button", "", ...holder.childNodes);
  button.type = "button";
  holder.append(button);
  return button;
}

// --- the picture ---

// Of each model its name, and its numbers as [heading, text], as the table has them.
const headings = all("#models th[scope=col]").map((heading) => heading.textContent);
const models = all("#models tbody tr").map((row) => ({
  name: row.dataset.name,
  numbers: all("td", row).map((cell, i) => [headings[i + 1], cell.textContent]),
}));
const canvas = document.querySelector(".canvas");
const HINT = "Point at a mark for its numbers; click it, or press Enter, to find it in the table.";
let chosen = null;

/** Give a class to everything that shows a model, and take it from everything else. */
function highlight(kind, index) {
  for (const part of all("[data-model]")) part.classList.toggle(kind, part.dataset.model === index);
}

/** Show a model's numbers beside its mark; hide them where there is none. */
function showTip(index) {
  const tip = canvas.querySelector(".tip");
  const mark = all(`.mark[data-model="${index}"] .shape`, canvas).find((shape) => shape.getClientRects().length);
  tip.hidden = !mark;
  if (!mark) return;
  const list = element("dl", "");
  for (const [name, text] of models[index].numbers) list.append(element("dt", name), element("dd", text));
  tip.replaceChildren(element("strong", models[index].name), list);
  const frame = canvas.getBoundingClientRect(), place = mark.getBoundingClientRect();
  const right = place.right - frame.left + 14, left = place.left - frame.left - 14 - tip.offsetWidth;
  const fits = right + tip.offsetWidth <= frame.width;
  tip.style.left = `${fits ? right : Math.max(0, left)}px`;
  const middle = place.top - frame.top - tip.offsetHeight / 2;
  // On a phone neither side has room: then below the picture.
  const top = fits || left >= 0 ? Math.max(0, Math.min(middle, frame.height - tip.offsetHeight)) : frame.height;
  tip.style.top = `${top}px`;
}

function point(target) {
  const at = target?.closest("[data-model]");
  highlight("pointed", at?.dataset.model);
  showTip(at && !at.closest("table") ? at.dataset.model : undefined);
}

/** Choose a model, or none if it was chosen already. */
function choose(index) {
  chosen = chosen === index ? null : index;
  highlight("chosen", chosen);
  for (const part of all("[aria-pressed]")) {
    part.setAttribute("aria-pressed", part.closest("[data-model]").dataset.model === chosen);
  }
  const said = document.querySelector(".said");
  said.replaceChildren(HINT);
  if (chosen === null) return;
  const link = element("a", "see its row");
  link.href = `#model-${Number(chosen) + 1}`;
  const [[, accuracy]] = models[chosen].numbers;
  said.replaceChildren(element("strong", models[chosen].name), `, ${accuracy} right: `, link, ".");
}

/** Put a cost on the horizontal axis: show its ticks, and move the marks to where it has them. */
function setCost(key) {
  showTip();
  for (const axis of all("[data-cost]", canvas)) {
    axis.setAttribute("display", axis.dataset.cost === key ? "inline" : "none");
  }
  for (const mark of all(".mark", canvas)) {
    mark.style.transform = `translate(${mark.dataset[key]}px, ${mark.dataset.y}px)`;
  }
  for (const drawing of all("svg", canvas)) drawing.dataset.across = key;
}

/** Make a drawing's marks into buttons with one stop of the Tab key; arrows go from mark to mark as they stand. */
function makeMarksButtons(drawing) {
  drawing.setAttribute("role", "group");
  const marks = all(".mark", drawing);
  for (const mark of marks) {
    const model = models[mark.dataset.model];
    const label = model.numbers.map((pair) => pair.join(" ")).join(", ");
    mark.setAttribute("role", "button");
    mark.setAttribute("aria-label", `${model.name}: ${label}`);
    mark.setAttribute("aria-pressed", "false");
    mark.setAttribute("tabindex", mark === marks[0] ? "0" : "-1");
  }
  drawing.addEventListener("keydown", (event) => {
    const key = drawing.dataset.across;
    const order = [...marks].sort((a, b) => a.dataset[key] - b.dataset[key]);
    const here = order.indexOf(event.target.closest(".mark"));
    const next = here + 1, previous = here - 1;
    const steps = { ArrowRight: next, ArrowDown: next, ArrowLeft: previous, ArrowUp: previous, Home: 0, End: -1 };
    if (event.key === "Enter" || event.key === " ") choose(event.target.dataset.model);
    else if (event.key in steps) {
      const target = order.at(steps[event.key] % order.length);
      for (const mark of marks) mark.setAttribute("tabindex", mark === target ? "0" : "-1");
      target.focus();
    } else return;
    event.preventDefault();
  });
}

function startPicture() {
  document.documentElement.classList.add("script");
  for (const drawing of all("svg", canvas)) makeMarksButtons(drawing);
  for (const name of all("tbody .name")) makeButton(name).setAttribute("aria-pressed", "false");
  const choice = document.querySelector(".choice");
  choice.hidden = false;
  document.querySelector(".said").append(HINT);
  // A browser that reloads a page keeps what was chosen on it. Only later choices are seen moving.
  setCost(choice.querySelector(":checked").value);
  canvas.getBoundingClientRect();
  canvas.classList.add("moving");
  choice.addEventListener("change", (event) => setCost(event.target.value));
  for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, (event) => point(event.target));
  document.addEventListener("focusout", () => point());
  document.addEventListener("keydown", (event) => event.key === "Escape" && point());
  document.addEventListener("click", (event) => {
    const at = event.target.closest("[data-model]");
    if (at) choose(at.dataset.model);
  });
}

// --- the table ---

/** Sort a table's rows by a column: the largest first, and the smallest first when asked again; gaps last. */
function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const order = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) =>
    value(a) === "" || value(b) === "" ? (value(a) === "") - (value(b) === "") : sign * (value(a) - value(b)));
  table.tBodies[0].append(...rows);
}

function startTable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => makeButton(head).addEventListener("click", () => sortBy(table, column)));
  heads[0].setAttribute("aria-sort", "ascending");
}

// --- figures in large ---

function startFigures() {
  const links = all(".enlarge"), dialog = document.getElementById("large");
  const [sheet, caption] = dialog.children;
  let shown = 0;
  const show = (index) => {
    shown = (index + links.length) % links.length;
    const picture = links[shown].querySelector("img");
    sheet.replaceChildren(picture.cloneNode());
    caption.textContent = picture.alt;
  };
  links.forEach((link, index) => link.addEventListener("click", (event) => {
    event.preventDefault();
    show(index);
    dialog.showModal();
  }));
  for (const button of all("button", dialog)) {
    button.addEventListener("click", () => (button.value ? show(shown + Number(button.value)) : dialog.close()));
  }
  sheet.addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(shown + step);
  });
}

if (canvas) startPicture();
all("#models table").forEach(startTable);
startFigures();
