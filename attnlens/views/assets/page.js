"use strict";
// Draw the figures in the reader's colours, and sort tables by their column heads.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };

  const ground = () => {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(name).trim();
  };

  function themed(figure) {
    const colour = ground();
    const layout = structuredClone(figure.layout);
    layout.paper_bgcolor = "rgba(0,0,0,0)";
    layout.font = { ...layout.font, color: colour("--ink") };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: colour("--line"), activecolor: colour("--accent") };
    layout.hoverlabel = { ...layout.hoverlabel, bgcolor: colour("--tint"), bordercolor: colour("--line") };
    layout.hoverlabel.font = { ...layout.hoverlabel.font, color: colour("--ink") };
    for (const [name, part] of Object.entries(layout)) {
      if (/^[xy]axis\d*$/.test(name)) {
        part.gridcolor = part.zerolinecolor = part.linecolor = colour("--line");
      }
      if (dark.matches && name.startsWith("coloraxis")) {
        part.colorscale = DARK_SCALES[part.cmin < 0 ? "diverging" : "sequential"];
      }
    }
    const data = structuredClone(figure.data);
    for (const trace of data) {
      if (trace.type !== "table") continue;
      trace.header = { ...trace.header, fill: { color: colour("--tint") }, line: { color: colour("--line") } };
      trace.cells = { ...trace.cells, fill: { color: colour("--paper") }, line: { color: colour("--line") } };
    }
    return [data, layout];
  }

  const figures = [...document.querySelectorAll("[data-figure]")].map((place) => {
    const source = document.getElementById(place.dataset.figure).textContent;
    return { place, figure: JSON.parse(source) };
  });
  const draw = () => figures.forEach(({ place, figure }) => Plotly.react(place, ...themed(figure), config));
  draw();
  dark.addEventListener("change", draw);

  const key = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.value ?? cell.textContent;
    return value !== "" && !Number.isNaN(Number(value)) ? Number(value) : value;
  };
  const compare = (a, b) => {
    const missing = (x) => x === "nan" || x === "";
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };
  function sortBy(head) {
    const table = head.closest("table");
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const numeric = rows.length > 0 && typeof key(rows[0], head.cellIndex) === "number";
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : numeric;
    rows.sort((a, b) => (down ? -1 : 1) * compare(key(a, head.cellIndex), key(b, head.cellIndex)));
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }
  document.querySelectorAll("table.sortable th").forEach((head) => {
    const first = head.closest("table").tBodies[0].rows[0];
    if (first && first.cells[head.cellIndex].classList.contains("number")) head.classList.add("number");
    head.tabIndex = 0;
    head.addEventListener("click", () => sortBy(head));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sortBy(head); }
    });
  });
})();
