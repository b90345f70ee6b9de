// Where a viewer stands in a recording: following what comes in, playing it again, or holding still.
import { Observable } from "../observable";
import type { Recording } from "./recording";

// Whoever follows is never further behind than about this, however many steps come.
const MAX_LAG_SECONDS = 4;
const FASTEST_REPLAY = 60;
const LONGEST_REPLAY_SECONDS = 30;

export class Player extends Observable {
  at = 0;
  isPlaying = true;
  #last = 0;
  #owed = 0;
  #isRunning = false;
  #isReplay = false;
  readonly #leave: () => void;

  constructor(
    readonly recording: Recording,
    readonly rate: () => number,
  ) {
    super();
    this.#leave = recording.subscribe(() => {
      this.changed();
      this.#run();
    });
    this.#run();
  }

  close(): void {
    this.#leave();
    this.isPlaying = false;
  }

  get isAtEnd(): boolean {
    return this.at >= this.recording.numSteps;
  }

  /** Show one step and stay there. */
  hold(step: number): void {
    this.isPlaying = false;
    this.at = Math.min(Math.max(step, 0), this.recording.numSteps);
    this.changed();
  }

  /** Go on from here, or from the start where the end was reached. */
  play(): void {
    if (this.isAtEnd) this.at = 0;
    this.#isReplay = this.recording.isComplete;
    this.isPlaying = true;
    this.#run();
    this.changed();
  }

  #run(): void {
    if (this.#isRunning || !this.isPlaying || this.isAtEnd) return;
    this.#last = performance.now();
    this.#owed = 1;
    this.#schedule();
  }

  #tick(now: number): void {
    this.#isRunning = false;
    if (!this.isPlaying) return;
    const behind = this.recording.numSteps - this.at;
    const rate = this.#speed(behind);
    this.#owed = rate === Infinity ? behind : this.#owed + (rate * Math.max(0, now - this.#last)) / 1000;
    this.#last = now;
    const steps = Math.min(behind, Math.floor(this.#owed));
    if (steps > 0) {
      this.#owed -= steps;
      this.at += steps;
      this.changed();
    }
    if (this.isAtEnd) this.#isReplay = false;
    else this.#schedule();
  }

  #schedule(): void {
    this.#isRunning = true;
    requestAnimationFrame((now) => this.#tick(now));
  }

  /** Return steps per second: a replay always takes time, whoever follows must keep up. */
  #speed(behind: number): number {
    if (this.#isReplay) {
      const pace = Math.min(this.rate(), FASTEST_REPLAY);
      return Math.max(pace, this.recording.numSteps / LONGEST_REPLAY_SECONDS);
    }
    return Math.max(this.rate(), behind / MAX_LAG_SECONDS);
  }
}
