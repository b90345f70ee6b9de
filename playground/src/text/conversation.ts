// A conversation: questions, each with one answer, or with two that were made side by side.
import { drawSeed } from "../api/seeds";
import type { TextModel } from "../api/types";
import type { Settings } from "../controls/values";
import { Observable } from "../observable";
import { announce } from "../announce";
import { Answer, type Message } from "./answer";

export interface Turn {
  question: string;
  answers: Answer[];
}

export class Conversation extends Observable {
  turns: Turn[] = [];

  get isRunning(): boolean {
    return this.turns.some((turn) => turn.answers.some((answer) => answer.isRunning));
  }

  get isEmpty(): boolean {
    return this.turns.length === 0;
  }

  clear(): void {
    this.stop();
    this.turns = [];
    this.changed();
  }

  stop(): void {
    for (const turn of this.turns) for (const answer of turn.answers) answer.stop();
  }

  /** Ask with each of the settings at the same time, so that the answers denoise in one batch. */
  async ask(model: TextModel, question: string, settings: readonly Settings[]): Promise<void> {
    const messages = [...this.#history(), { role: "user", content: question } as const];
    const names = settings.length > 1 ? ["A", "B"] : ["Answer"];
    // One seed for both: what differs between them is what the settings do.
    const seed = drawSeed();
    const answers = settings.map((each, index) => new Answer(model, each, names[index] ?? "", seed));
    this.turns = [...this.turns, { question, answers }];
    this.changed();
    await Promise.all(answers.map((answer) => answer.run(messages)));
    this.changed();
    for (const answer of answers) announce(`${answer.name}: ${answer.text || (answer.failure ?? "empty")}`);
  }

  /** The conversation goes on from the first of two answers; what failed is left out. */
  #history(): Message[] {
    const messages: Message[] = [];
    for (const { question, answers } of this.turns) {
      const [answer] = answers;
      if (!answer || answer.failure !== null) continue;
      messages.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
    }
    return messages;
  }
}
