"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Intervals: always there without script and in print, else on demand.
  const bases = document.getElementById("bases");
  if (bases) {
    bases.hidden = false;
    bases.addEventListener("click", () => bases.setAttribute("aria-pressed", root.classList.toggle("bases")));
  }

  // Print shows what is folded away; afterwards all is as it was.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });

  // The gallery. The filter is the address's fragment (#outcome=wrong&model=...), so that a view can be linked to.
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const FEW = 24;
  const cards = [...gallery.querySelectorAll(".card")];
  const groups = [...gallery.querySelectorAll("[data-facet]")];
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let limit = FEW;

  const chosen = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    const filter = {};
    for (const group of groups) {
      const value = asked.get(group.dataset.facet);
      const known = [...group.querySelectorAll("button")].some(button => button.dataset.value === value);
      if (value && known) filter[group.dataset.facet] = value;
    }
    return filter;
  };
  const matches = (card, filter) => Object.entries(filter).every(([facet, value]) => card.dataset[facet] === value);

  const show = () => {
    const filter = chosen();
    let found = 0;
    for (const card of cards) card.hidden = !(matches(card, filter) && ++found <= limit);
    const shown = Math.min(found, limit);
    count.textContent = (shown < found ? `The first ${shown} of ${found} images` : `${found} ${found === 1 ? "image" : "images"}`)
      + (found < cards.length ? `, of ${cards.length} in all` : "");
    more.hidden = shown === found;
    more.textContent = `Show all ${found}`;
    for (const group of groups) {
      const facet = group.dataset.facet;
      for (const button of group.querySelectorAll("button")) {
        const value = button.dataset.value;
        button.setAttribute("aria-pressed", (filter[facet] || "") === value);
        const number = button.querySelector("small");
        if (number) number.textContent = cards.filter(card => matches(card, { ...filter, [facet]: value })).length;
      }
    }
  };

  gallery.addEventListener("click", event => {
    const button = event.target.closest("[data-facet] button");
    if (!button) return;
    const filter = { ...chosen(), [button.closest("[data-facet]").dataset.facet]: button.dataset.value };
    const kept = Object.entries(filter).filter(([, value]) => value);
    history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
    limit = FEW;
    show();
  });
  more.addEventListener("click", () => {
    const next = cards.find(card => card.hidden && matches(card, chosen()));
    limit = Infinity;
    show();
    // The button is gone: keyboard focus moves to the first new card.
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
  });
  addEventListener("hashchange", () => { limit = FEW; show(); });

  document.getElementById("filters").hidden = false;
  count.hidden = false;
  show();
})();
