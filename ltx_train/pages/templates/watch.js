"use strict";
// A part is replaced only when it has changed, so that a clip that plays goes on playing.
const shown = {};
async function refresh() {
  try {
    const answer = await fetch("/parts.json", {cache: "no-store"});
    const parts = await answer.json();
    for (const [name, part] of Object.entries(parts)) {
      if (shown[name] !== undefined && shown[name] !== part) document.getElementById(name).innerHTML = part;
      shown[name] = part;
    }
    document.getElementById("lost").hidden = true;
  } catch {
    document.getElementById("lost").hidden = false;
  }
}
refresh();
setInterval(refresh, 3000);
