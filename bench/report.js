"use strict";

// Filters: which op and which dtype to show. None chosen means all. The choice stands in the URL's hash.
const filters = [...document.querySelectorAll(".filter")];
const parts = [...document.querySelectorAll("article")];

function chosen(filter) {
  const pressed = [...filter.querySelectorAll("button[aria-pressed=true]")];
  return pressed.map((button) => button.dataset.value).filter(Boolean);
}

function choose(filter, values) {
  for (const button of filter.querySelectorAll("button")) {
    const value = button.dataset.value;
    button.setAttribute("aria-pressed", String(value ? values.includes(value) : !values.length));
  }
}

function show() {
  for (const part of parts) {
    part.hidden = filters.some((filter) => {
      const values = chosen(filter);
      return values.length > 0 && !values.includes(part.dataset[filter.dataset.name]);
    });
  }
  for (const section of document.querySelectorAll("section")) {
    section.hidden = !section.querySelector("article:not([hidden])");
  }
  const shown = parts.filter((part) => !part.hidden).length;
  const what = shown ? `${shown} of ${parts.length} parts shown` : "No part of the run is of this op and type";
  document.getElementById("status").textContent = shown < parts.length ? what : "";
}

function readHash() {
  const hash = new URLSearchParams(location.hash.slice(1));
  for (const filter of filters) {
    const known = [...filter.querySelectorAll("button")].map((button) => button.dataset.value);
    choose(filter, hash.getAll(filter.dataset.name).filter((value) => value && known.includes(value)));
  }
  show();
}

function writeHash() {
  const hash = new URLSearchParams();
  for (const filter of filters) {
    for (const value of chosen(filter)) hash.append(filter.dataset.name, value);
  }
  history.replaceState(null, "", String(hash) ? `#${hash}` : location.href.split("#")[0]);
}

for (const filter of filters) {
  filter.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const value = button.dataset.value;
    const before = chosen(filter);
    choose(filter, !value ? [] : before.includes(value) ? before.filter((x) => x !== value) : [...before, value]);
    show();
    writeHash();
  });
}
addEventListener("hashchange", readHash);
document.getElementById("filters").hidden = parts.length < 2;
readHash();

// Tables: a column is sorted upwards, downwards, and then as the run had it. What has no number stays at the end.
function sort(table, column, direction) {
  const body = table.tBodies[0];
  const number = (row) => parseFloat(row.cells[column]?.dataset.value ?? "NaN");
  const text = (row) => row.cells[column]?.textContent.trim() ?? "";
  const sign = direction === "descending" ? -1 : 1;
  const compare = (a, b) => {
    if (direction === "none") return a.dataset.place - b.dataset.place;
    if (column < 2) return sign * text(a).localeCompare(text(b), "en", { numeric: true });
    const [x, y] = [number(a), number(b)];
    return isNaN(x) - isNaN(y) || sign * (x - y) || 0;
  };
  body.append(...[...body.rows].sort(compare));
  table.classList.toggle("sorted", direction !== "none");
}

for (const table of document.querySelectorAll("table")) {
  [...table.tBodies[0].rows].forEach((row, place) => (row.dataset.place = place));
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")] ?? "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (next !== "none") head.setAttribute("aria-sort", next);
      sort(table, column, next);
    });
  });
}
