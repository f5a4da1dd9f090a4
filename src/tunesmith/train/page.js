for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.ariaSort === "ascending";
      heads.forEach((other) => (other.ariaSort = null));
      head.ariaSort = down ? "descending" : "ascending";
      const rows = [...table.tBodies[0].rows].sort((a, b) =>
        key(a, i).localeCompare(key(b, i), "en", { numeric: true }) * 1);
      const numbers = rows.every((row) => row.cells[i].dataset.value !== undefined);
      if (numbers) rows.sort((a, b) => key(a, i) - key(b, i));
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
