package memory_test

import (
	"testing"

	"github.com/deed-go/deed/eventstore/memory"
	"github.com/deed-go/deed/projection/statetest"
)

func TestInline(t *testing.T) {
	statetest.RunInline(t, func(testing.TB) statetest.InlineStore { return memory.New() }, statetest.Features{})
}
