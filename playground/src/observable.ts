// Objects that change while they are drawn: a change is drawn at most once per frame of the screen.
import { useEffect, useState } from "preact/hooks";

export class Observable {
  #listeners = new Set<() => void>();
  #isScheduled = false;

  /** Tell whoever draws this that it has changed. */
  changed(): void {
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => {
      this.#isScheduled = false;
      for (const listener of [...this.#listeners]) listener();
    });
  }

  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

/** Draw the calling component again whenever the object changes. */
export function useObserved<T extends Observable>(observed: T): T {
  const [, setCount] = useState(0);
  useEffect(() => observed.subscribe(() => setCount((count) => count + 1)), [observed]);
  return observed;
}
