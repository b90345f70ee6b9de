// What a screen reader is told: whole answers and ends, not every step on the way.
import { visible } from "./canvas/visible";
import { Observable, useObserved } from "./observable";

class Announcer extends Observable {
  text = "";

  say(text: string): void {
    this.text = text;
    this.changed();
  }
}

const announcer = new Announcer();

/** Say something once whatever is said now has been said. */
export function announce(text: string): void {
  announcer.say(text);
}

export function Announcements() {
  useObserved(announcer);
  return (
    <div class="only-heard" role="status" aria-live="polite">
      {visible(announcer.text)}
    </div>
  );
}
