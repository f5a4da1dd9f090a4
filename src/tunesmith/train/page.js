for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const key = (row) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows], numbers = rows.every((row) => row.cells[i].dataset.value !== undefined);
      rows.sort((a, b) => (numbers ? key(a) - key(b) : key(a).localeCompare(key(b))));
      body.append(...(down ? rows.reverse() : rows));
    });
  });
}
