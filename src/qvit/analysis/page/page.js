"use strict";
// The tables are whole without this; with it their headings sort them: upwards, downwards, and as they were.
(() => {
  const collator = new Intl.Collator("en", { numeric: true });
  const next = { none: "ascending", ascending: "descending", descending: "none" };

  // What a cell of numbers begins with, as the report writes it: 1,234, -0.5 with any dash, 90.1 and a spread.
  const numberIn = (text) => parseFloat(text.replace(/,/g, "").replace(/^[+±]/, "").replace(/^[–−]/, "-"));

  const order = (first, second, numbers) =>
    numbers ? numberIn(first) - numberIn(second) : collator.compare(first, second);
  const isEmpty = (text, numbers) => (numbers ? Number.isNaN(numberIn(text)) : text === "");

  const sort = (body, rows, column, direction, numbers) => {
    const text = (row) => row.cells[column].textContent.trim();
    const full = rows.filter((row) => !isEmpty(text(row), numbers));
    const empty = rows.filter((row) => isEmpty(text(row), numbers));
    const sign = direction === "ascending" ? 1 : -1;
    full.sort((first, second) => sign * order(text(first), text(second), numbers));
    body.append(...(direction === "none" ? rows : [...full, ...empty]));
  };

  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const headings = [...table.tHead.rows[0].cells];
    if (rows.length < 2) continue;
    headings.forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const direction = next[heading.getAttribute("aria-sort")];
        for (const other of headings) other.setAttribute("aria-sort", "none");
        heading.setAttribute("aria-sort", direction);
        sort(body, rows, column, direction, heading.classList.contains("number"));
      });
    });
  }
})();
