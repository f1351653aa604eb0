const box = document.querySelector("input"), count = document.querySelector("output");
const sections = [...document.querySelectorAll("[data-entry]")];
function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const section of sections) {
    const text = section.textContent.toLowerCase();
    section.hidden = !words.every(word => text.includes(word));
    shown += !section.hidden;
  }
  count.textContent = words.length ? `${shown} of ${sections.length} shown` : "";
}
box.addEventListener("input", search);
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape") { box.value = ""; search(); }
});
