// The browser's storage. If it is disabled or full, values are kept in memory, until the page is left.

/** @param {() => Storage} storage */
function keeper(storage) {
  /** @type {Map<string, string>} Values that the browser did not store. */
  const notTaken = new Map();
  return {
    /**
     * @param {string} name
     * @returns {string} "" if nothing is stored
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
     * @param {string} value "" removes it
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

/** Until the tab is closed: conversations, and keys, which are stored nowhere else. */
export const session = keeper(() => sessionStorage);

/** Permanently: the appearance of the page. */
export const lasting = keeper(() => localStorage);
