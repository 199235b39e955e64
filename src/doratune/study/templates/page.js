(() => {
  "use strict";
  const root = document.documentElement;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = getComputedStyle(root).colorScheme === "dark";
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Tables: a click on a heading sorts by it, again the other way round. Rows without a value stay last.
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  function sort(table, index) {
    const head = table.tHead.rows[0].cells[index];
    const number = head.classList.contains("number");
    const first = number ? "descending" : "ascending";
    const order = head.ariaSort === "none" ? first : head.ariaSort === "ascending" ? "descending" : "ascending";
    for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
    head.ariaSort = order;
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].map((row) => [row.cells[index].dataset.key, row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (number ? a - b : compare(a, b));
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }
  for (const box of document.querySelectorAll("[data-table]")) {
    const table = box.querySelector("table");
    [...table.tHead.rows[0].cells].forEach((head, index) =>
      head.querySelector("button").addEventListener("click", () => sort(table, index)));
    box.querySelector("input")?.addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/);
      for (const row of table.tBodies[0].rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
  }

  // Marks in plots: what they are, and the same layer wherever it is drawn.
  const tip = document.getElementById("tip");
  const groups = new Map();
  for (const element of document.querySelectorAll("[data-group]")) {
    const name = element.dataset.group;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(element);
  }
  let lit = null;
  function light(name) {
    if (name === lit) return;
    for (const element of groups.get(lit) ?? []) {
      element.classList.remove("lit");
      element.closest("svg")?.classList.remove("focused");
    }
    for (const element of groups.get(name) ?? []) {
      element.classList.add("lit");
      element.closest("svg")?.classList.add("focused");
    }
    lit = name;
  }
  document.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("[data-tip], tr[data-group]");
    light(mark?.dataset.group ?? null);
    tip.hidden = !mark?.dataset.tip;
    if (tip.hidden) return;
    tip.textContent = mark.dataset.tip;
    const at = mark.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = at.left + at.width / 2 - size.width / 2;
    tip.style.left = `${Math.max(6, Math.min(left, innerWidth - size.width - 6))}px`;
    tip.style.top = `${at.top - size.height - 8 < 4 ? at.bottom + 8 : at.top - size.height - 8}px`;
  });
  document.addEventListener("scroll", () => { tip.hidden = true; light(null); }, { passive: true });
})();
