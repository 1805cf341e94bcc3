// Runs before the first paint, so that a chosen theme does not flash up as the other one. frame.js does the rest.
try {
  const theme = localStorage.getItem("stellarbyte.theme");
  if (theme !== null) document.documentElement.dataset["theme"] = theme;
} catch {
  // Without storage the browser's own theme counts.
}
