// What the page keeps in the browser. Where that is switched off or full, it keeps nothing and works on.

/** @param {() => Storage} storage */
function keeper(storage) {
  return {
    /**
     * @param {string} name
     * @returns {string} "" when nothing is kept
     */
    read(name) {
      try {
        return storage().getItem(`stellarbyte.${name}`) ?? "";
      } catch {
        return "";
      }
    },
    /**
     * @param {string} name
     * @param {string} value "" forgets it
     * @returns {boolean} whether it is kept now
     */
    write(name, value) {
      try {
        if (value === "") storage().removeItem(`stellarbyte.${name}`);
        else storage().setItem(`stellarbyte.${name}`, value);
        return true;
      } catch {
        return false;
      }
    },
  };
}

/** Until the tab is closed: conversations, and keys, which are nowhere else. */
export const session = keeper(() => sessionStorage);

/** For good: how the page looks. */
export const lasting = keeper(() => localStorage);
