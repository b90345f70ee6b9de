// What stands where the conversation will be: what there is to see, and questions that work.
import type { TextModel } from "../api/types";

// What the embedded models were trained for; they know nothing else.
const EMBEDDED = "sfumato-tiny-";
const EXAMPLES = [
  "Tom has 12 apples and buys 7 more. He gives away 4. How many are left?",
  "Mia, 34, nurse in Oslo",
  "Sort the words: pear apple fig",
];

interface Props {
  model: TextModel;
  onAsk: (question: string) => void;
}

export function Welcome({ model, onAsk }: Props) {
  return (
    <section class="welcome">
      <h2>Watch it denoise</h2>
      <p class="lead">
        An answer begins as haze: every position holds a guess. With each step the model is surer of some of
        them, and decides; which ones, and how many at once, is the decoding algorithm's choice.
      </p>
      {model.id.startsWith(EMBEDDED) && (
        <div class="examples" role="group" aria-label="Questions that this small model knows">
          {EXAMPLES.map((example) => (
            <button type="button" class="chip" key={example} onClick={() => onAsk(example)}>
              {example}
            </button>
          ))}
        </div>
      )}
    </section>
  );
}
