package storetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/eventstore"
)

// The model of linearizability: a stream is a list of events; an append with
// an expectation adds to it if the list is that long, and otherwise tells how
// long it is; a read returns the list.
type streamCall struct {
	stream int
	read   bool
	// expected is the version demanded; -1: none.
	expected int
	id       string
}

type streamAnswer struct {
	conflict bool
	version  int // reached, or actual when conflict
	ids      string
}

type streamState struct {
	version int
	ids     string
}

var streamModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		var parts [][]porcupine.Operation
		index := map[int]int{}
		for _, op := range history {
			s := op.Input.(streamCall).stream
			at, ok := index[s]
			if !ok {
				at = len(parts)
				index[s] = at
				parts = append(parts, nil)
			}
			parts[at] = append(parts[at], op)
		}
		return parts
	},
	Init: func() any { return streamState{} },
	Step: func(state, input, output any) (bool, any) {
		st, call, answer := state.(streamState), input.(streamCall), output.(streamAnswer)
		switch {
		case call.read:
			return answer.ids == st.ids, st
		case answer.conflict:
			return call.expected >= 0 && call.expected != st.version && answer.version == st.version, st
		case call.expected >= 0 && call.expected != st.version:
			return false, st
		}
		next := streamState{version: st.version + 1, ids: st.ids + call.id + " "}
		return answer.version == next.version, next
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v -> %+v", input, output) },
}

// checkLinearizable records a concurrent history of appends and reads and asks
// porcupine for an order that explains it.
func checkLinearizable(t testing.TB, s *suite, r *rand.Rand) {
	ctx, store := s.context(t), s.open(t)
	const clients, streams = 6, 2
	each := pick(40, 15)
	seeds := make([]uint64, clients)
	for i := range seeds {
		seeds[i] = r.Uint64()
	}
	var mu sync.Mutex
	var history []porcupine.Operation
	started := time.Now()
	now := func() int64 { return int64(time.Since(started)) }
	require.NoError(t, together(clients, func(i int, gate func()) error {
		r := rand.New(rand.NewPCG(seeds[i], 2))
		known := make([]int, streams)
		gate()
		for n := range each {
			call := streamCall{stream: r.IntN(streams), read: r.IntN(3) == 0, expected: -1, id: fmt.Sprintf("%d.%d", i, n)}
			of := account(fmt.Sprint(call.stream))
			var answer streamAnswer
			begin := now()
			if call.read {
				got, err := all(store.Read(ctx, eventstore.OneStream(of), eventstore.ReadOptions{}))
				if err != nil {
					return err
				}
				for _, e := range got {
					answer.ids += e.Type + " "
				}
				known[call.stream] = len(got)
			} else {
				c := commit(event(of, call.id))
				if r.IntN(4) != 0 {
					call.expected = known[call.stream]
					c.Conditions = []eventstore.Condition{eventstore.StreamAt(of, eventstore.Revision{Version: uint64(call.expected)})}
				}
				receipt, err := store.Append(ctx, c)
				var conflict *eventstore.ConflictError
				switch {
				case err == nil:
					answer.version = int(receipt.Revision(of).Version)
				case errors.As(err, &conflict):
					answer = streamAnswer{conflict: true, version: int(conflict.Actual.Version)}
				default:
					return err
				}
				known[call.stream] = answer.version
			}
			end := now()
			mu.Lock()
			history = append(history, porcupine.Operation{ClientId: i, Input: call, Call: begin, Output: answer, Return: end})
			mu.Unlock()
		}
		return nil
	}))
	switch porcupine.CheckOperationsTimeout(streamModel, history, s.patience) {
	case porcupine.Illegal:
		for _, op := range history {
			t.Logf("client %d [%d, %d]: %s", op.ClientId, op.Call, op.Return, streamModel.DescribeOperation(op.Input, op.Output))
		}
		require.Fail(t, "the history is not linearizable: no order of these operations explains their answers")
	case porcupine.Unknown:
		t.Logf("the checker gave up after %s: no verdict on this history", s.patience)
	case porcupine.Ok:
	}
}
