// Objects that change while they are drawn: a change is drawn at most once per frame of the screen.
import { useEffect, useState } from "preact/hooks";

export class Observable {
  #listeners = new Set<() => void>();
  #isScheduled = false;
  version = 0;

  /** Tell whoever draws this that it has changed. */
  changed(): void {
    this.version += 1;
    if (this.#isScheduled) return;
    this.#isScheduled = true;
    requestAnimationFrame(() => {
      this.#isScheduled = false;
      for (const listener of [...this.#listeners]) listener();
    });
  }

  /** Call the listener after every change, until what is returned is called. */
  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  }
}

/** Draw the calling component again whenever the object changes. */
export function useObserved<T extends Observable>(observed: T): T {
  const [, setCount] = useState(0);
  const drawn = observed.version;
  useEffect(() => {
    const draw = () => setCount((count) => count + 1);
    // It may have changed between this drawing and now, with nobody listening.
    if (observed.version !== drawn) draw();
    return observed.subscribe(draw);
  }, [observed]);
  return observed;
}
