package esdbserver_test

import (
	"testing"

	"github.com/EventStore/EventStore-Client-Go/v4/esdb"
	"github.com/stretchr/testify/require"
)

func TestPoint01_NoStreamOnANewStream(t *testing.T) {
	both(t, func(t *kit) {
		t.append("a", esdb.NoStream{}, 0, event(`{}`))
		t.append("b-1", esdb.NoStream{}, 2, events(3)...)
		require.Equal(t, []uint64{0, 1, 2}, t.revisions("b-1", esdb.ReadStreamOptions{}, most))
		s := t.follow("a", esdb.SubscribeToStreamOptions{From: esdb.Start{}})
		require.Equal(t, uint64(0), t.next(s).Event.EventNumber)
		t.append("a", esdb.Revision(0), 1, event(`{}`))
		require.Equal(t, uint64(1), t.next(s).Event.EventNumber)
	})
}
