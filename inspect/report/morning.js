"use strict";
// A page that stands for longer than it should says so itself: nobody makes another while nothing runs.
const OLD_H = 26, LOOK_MS = 60000;
const old = document.querySelector(".old"), since = Number(old.dataset.made), until = Number(old.dataset.old ?? since + 3600 * OLD_H);
const age = () => {
  const now = Date.now() / 1000, hours = Math.floor((now - since) / 3600);
  if (now < until) return;
  old.textContent = `made ${hours} ${hours === 1 ? "hour" : "hours"} ago: the page is old`;
  old.hidden = false;
  const head = document.querySelector("header"), said = head.querySelector("strong");
  if (head.className !== "calm") return;
  head.className = "hold";
  document.title = document.title.replace(said.textContent, "Old page");
  said.textContent = "Old page";
};
age();
setInterval(age, LOOK_MS);
// Find and sort in the table of rolls; without a script it is read as it is.
const table = document.querySelector(".sortable"), filter = document.querySelector(".filter");
const WORDS = 3; // so many columns of words come first, then numbers, which are sorted from large to small
if (table !== null) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const words = rows.map((row) => [...row.cells].slice(0, WORDS).map((cell) => cell.textContent).join(" ").toLowerCase());
  if (filter !== null) {
    filter.hidden = false;
    const input = filter.querySelector("input"), told = filter.querySelector("[role=status]");
    input.addEventListener("input", () => {
      const sought = input.value.trim().toLowerCase();
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words[i].includes(sought);
        shown += row.hidden ? 0 : 1;
      });
      told.textContent = sought ? `${shown} of ${rows.length}` : "";
    });
  }
  const number = (cell) => {
    const value = parseFloat(cell.dataset.at ?? cell.textContent.replaceAll(",", ""));
    return isNaN(value) ? -Infinity : value;
  };
  const sort = (head, column) => {
    const first = column < WORDS ? "ascending" : "descending", other = column < WORDS ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first, sign = order === "ascending" ? 1 : -1;
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const compare = (a, b) => (column < WORDS ? a.textContent.localeCompare(b.textContent, "en", { numeric: true }) : number(a) - number(b) || 0);
    body.append(...[...rows].sort((a, b) => sign * compare(a.cells[column], b.cells[column])));
  };
  heads.forEach((head, column) => {
    if (head.scope !== "col") return;
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(head, column);
    });
  });
}
