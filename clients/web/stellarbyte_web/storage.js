// What the page keeps in the browser. Where that is switched off or full, the page itself remembers, and works on.

/** @param {() => Storage} storage */
function keeper(storage) {
  /** @type {Map<string, string>} What the browser did not take: known until the page is left. */
  const notTaken = new Map();
  return {
    /**
     * @param {string} name
     * @returns {string} "" when nothing is kept
     */
    read(name) {
      const known = notTaken.get(name);
      if (known !== undefined) return known;
      try {
        return storage().getItem(`stellarbyte.${name}`) ?? "";
      } catch {
        return "";
      }
    },
    /**
     * @param {string} name
     * @param {string} value "" forgets it
     * @returns {boolean} false if the browser has no room for it
     */
    write(name, value) {
      try {
        if (value === "") storage().removeItem(`stellarbyte.${name}`);
        else storage().setItem(`stellarbyte.${name}`, value);
        notTaken.delete(name);
        return true;
      } catch (error) {
        notTaken.set(name, value);
        return !(error instanceof DOMException && error.name === "QuotaExceededError");
      }
    },
  };
}

/** Until the tab is closed: conversations, and keys, which are nowhere else. */
export const session = keeper(() => sessionStorage);

/** For good: how the page looks. */
export const lasting = keeper(() => localStorage);
