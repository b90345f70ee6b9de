// All pictures of this tab, the newest first.
import { told } from "../api/client";
import { drawSeed, parseBody } from "../api/seeds";
import { Observable } from "../observable";
import { Drawing, type Asked } from "./drawing";
import { requestOf } from "./png";

export class Gallery extends Observable {
  drawings: Drawing[] = [];
  problem: string | null = null;

  /** Begin to draw, beside whatever is drawn already. */
  draw({ body, seed }: Asked): void {
    const drawing = new Drawing(body, seed || drawSeed());
    this.drawings = [drawing, ...this.drawings];
    this.problem = null;
    void drawing.run();
    this.changed();
  }

  remove(drawing: Drawing): void {
    drawing.cancel();
    drawing.forget();
    this.drawings = this.drawings.filter((each) => each !== drawing);
    this.changed();
  }

  /** Draw what a file of ours shows once more. */
  async repeatFile(file: File): Promise<void> {
    const json = requestOf(new Uint8Array(await file.arrayBuffer()));
    try {
      if (json === null) throw new Error("it carries no request of Sfumato's");
      this.draw(parseBody(json));
    } catch (error) {
      this.problem = `${file.name}: ${told(error)}`;
      this.changed();
    }
  }
}
