package main

import (
	"fmt"
	"io"
	"time"
)

// Progress is how far a replay has come.
type Progress struct {
	Date     time.Time
	Rows     int // of the log
	Executed int // of them by this run
	Events   int // in the store
}

func (p Progress) String() string {
	if p.Date.IsZero() {
		return "no date"
	}
	return fmt.Sprintf("%s (%s rows)", p.Date.Format(time.DateOnly), thousands(int64(p.Rows)))
}

// screen shows progress in one line, on a terminal only.
type screen struct {
	w        io.Writer
	terminal bool
	began    time.Time
	shown    time.Time
	first    int // events in the store when this run began
	last     Progress
}

func newScreen(w io.Writer, began time.Time) *screen {
	return &screen{w: w, terminal: isTerminal(w), began: began, first: -1}
}

// show is called after every date and draws ten times a second at most.
func (s *screen) show(p Progress) {
	if s.first < 0 {
		s.first = p.Events
	}
	s.last = p
	if now := time.Now(); s.terminal && now.Sub(s.shown) > 100*time.Millisecond {
		s.shown = now
		seconds := now.Sub(s.began).Seconds()
		fmt.Fprintf(s.w, "\r\x1b[K%s  %s rows  %s rows/s  %s events/s", p.Date.Format(time.DateOnly), thousands(int64(p.Rows)),
			thousands(int64(float64(p.Executed)/seconds)), thousands(int64(float64(p.Events-s.first)/seconds)))
	}
}

func (s *screen) clear() {
	if s.terminal {
		fmt.Fprint(s.w, "\r\x1b[K")
	}
}
