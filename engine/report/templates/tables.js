function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[column];
  const numeric = [...table.tBodies[0].rows].some((row) => row.cells[column].dataset.v && isFinite(row.cells[column].dataset.v));
  const before = head.getAttribute("aria-sort");
  const down = before ? before === "ascending" : numeric;
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.v;
  const rows = [...table.tBodies[0].rows].sort((one, two) => {
    const [a, b] = [key(one), key(two)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // empty cells stay last
    const order = numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table[data-sortable]"))
  [...table.tHead.rows[0].cells].forEach((head, column) =>
    head.firstElementChild.addEventListener("click", () => sortTable(table, column)));

for (const input of document.querySelectorAll(".find"))
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of input.parentElement.querySelectorAll("tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
