// Something that grows at its end is followed there, unless somebody has scrolled away from it.
import type { RefObject } from "preact";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";

const NEAR_PIXELS = 40;

/** Keep the element scrolled to its end with every drawing, as long as it was there before. */
export function useFollow(element: RefObject<HTMLElement | null>): void {
  const isAtEnd = useRef(true);
  useEffect(() => {
    const { current } = element;
    if (!current) return;
    const note = () => {
      isAtEnd.current = current.scrollHeight - current.scrollTop - current.clientHeight < NEAR_PIXELS;
    };
    current.addEventListener("scroll", note, { passive: true });
    return () => current.removeEventListener("scroll", note);
  }, [element]);
  useLayoutEffect(() => {
    const { current } = element;
    if (current && isAtEnd.current) current.scrollTop = current.scrollHeight;
  });
}
