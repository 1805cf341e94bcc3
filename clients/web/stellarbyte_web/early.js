// Runs before the first paint, so that the other theme does not flash. frame.js does the rest.
try {
  const theme = localStorage.getItem("stellarbyte.theme");
  if (theme !== null) document.documentElement.dataset["theme"] = theme;
} catch {
  // Without storage, the browser's theme applies.
}
