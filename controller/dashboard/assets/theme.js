// Runs before the page is drawn, so that a theme that was chosen shows from the first picture on.
(() => {
  const chosen = localStorage.getItem("nanofleet-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
