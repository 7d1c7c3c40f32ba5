"use strict";
// Draws the figures of a page: each element with data-plot, from the JSON whose id it names.
for (const place of document.querySelectorAll("[data-plot]")) {
  const made = JSON.parse(document.getElementById(place.dataset.plot).textContent);
  Plotly.newPlot(place, made.data, made.layout, { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] });
}
