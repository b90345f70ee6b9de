// Where a question is written.
import { useEffect, useRef, useState } from "preact/hooks";
import type { TextModel } from "../api/types";
import type { Conversation } from "./conversation";

interface Props {
  model: TextModel;
  conversation: Conversation;
  onAsk: (question: string) => void;
}

export function Composer({ model, conversation, onAsk }: Props) {
  const [question, setQuestion] = useState("");
  const form = useRef<HTMLFormElement>(null);
  const { isRunning, isEmpty } = conversation;
  const label = model.has_chat_template ? "Your message" : "A text to continue";

  useEffect(() => {
    if (!isEmpty) form.current?.scrollIntoView({ block: "nearest" });
  }, [isRunning, isEmpty]);

  function ask(event: Event) {
    event.preventDefault();
    if (isRunning || question.trim() === "") return;
    onAsk(question);
    setQuestion("");
  }

  return (
    <form class="composer" ref={form} onSubmit={ask}>
      <div class="composer-row">
        <textarea
          name="question"
          rows={2}
          aria-label={label}
          placeholder={model.has_chat_template ? "Ask, then watch" : label}
          value={question}
          onInput={(event) => setQuestion(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
          }}
        />
        {isRunning ? (
          <button type="button" onClick={() => conversation.stop()}>
            Stop
          </button>
        ) : (
          <button type="submit" class="primary" disabled={question.trim() === ""}>
            Send
          </button>
        )}
        <button type="button" disabled={isEmpty} onClick={() => conversation.clear()}>
          Clear
        </button>
      </div>
    </form>
  );
}
